"""Quantizers: modules and values that hold a scale and a zero point, and know how they are chosen."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.errors import UserError, check_choice
from dqbench.quant.functional import fake_quantize, qrange
from dqbench.quant.plan import check_granularity
from dqbench.quant.ranges import (
    ESTIMATORS,
    PTQ4DM,
    blend,
    choose_qparams,
    extremes,
    ptq4dm_qparams,
    ptq4dm_range,
    range_qparams,
    sidedness,
)

OVER = {  # how batches are combined -> the estimators it can go with
    "first": ESTIMATORS,
    "all": ("minmax", "scaled_minmax"),
    "ema": ("minmax", "scaled_minmax", "percentile", "mse"),
    "ema_search": tuple(PTQ4DM),
}

KINDS = {  # of quantizers in a checkpoint -> the classes that rebuild them with from_spec()
    "uniform": "dqbench.quant.quantizers:ActQuantizer",
    "split": "dqbench.quant.quantizers:SplitQuantizer",
    "per_step": "dqbench.quant.clock:StepQuantizer",
    "zero_suppression": "dqbench.quant.dynamic:LzsQuantizer",
    "block_format": "dqbench.quant.dynamic:BlockQuantizer",
    "two_stage": "dqbench.quant.residual_acts:TwoStageQuantizer",
    "binned": "dqbench.quant.centroid_acts:BinnedQuantizer",
    "time_bins": "dqbench.quant.time_bins:TimeBins",
}


@dataclass
class WeightRule:
    """How weights are quantized. estimator: see ranges.py; granularity: per_tensor | per_channel | per_group."""

    granularity: str
    group_size: int | None
    estimator: str
    symmetric: bool
    official: bool  # the authors' release, where it differs from the sane form

    def __post_init__(self) -> None:
        check_granularity(self.granularity, self.group_size)
        if self.group_size is not None and self.granularity != "per_group":
            raise UserError(f"group_size={self.group_size} has no effect with granularity={self.granularity}")
        check_estimator(self.estimator, self.symmetric)

    @property
    def signed(self) -> bool:
        """Whether codes are signed; PTQ4DM's symmetric ranges lie on unsigned codes."""
        return self.symmetric and self.estimator not in PTQ4DM


@dataclass
class ActRule:
    """How an activation's range is found. over: first | all | ema | ema_search: how calibration batches combine.

    first: the first batch alone. all: extremes over all batches. ema: min and max of the batch, running average after
    the first. ema_search: the searched range of each batch, running average (PTQ4DM). `through`: the observed layer
    passes its input on unquantized while ranges are collected.
    """

    estimator: str
    symmetric: bool
    over: str
    momentum: float
    through: bool
    official: bool

    def __post_init__(self) -> None:
        check_estimator(self.estimator, self.symmetric)
        check_choice("over", self.over, OVER)
        if self.estimator not in OVER[self.over]:
            allowed = ", ".join(OVER[self.over])
            raise UserError(f"over={self.over} cannot be combined with estimator={self.estimator}; allowed: {allowed}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum} is out of range; allowed: 0 <= momentum < 1")

    @property
    def signed(self) -> bool:
        """Whether codes are signed; PTQ4DM's symmetric ranges lie on unsigned codes."""
        return self.symmetric and self.estimator not in PTQ4DM


def check_estimator(estimator: str, symmetric: bool) -> None:
    """Raise UserError for an unknown estimator, or one that takes no asymmetric form."""
    check_choice("estimator", estimator, ESTIMATORS)
    if estimator in PTQ4DM and not symmetric:
        raise UserError(f"estimator={estimator} searches symmetric ranges only; allowed with it: symmetric=true")


@dataclass(frozen=True)
class Grid:
    """The integer grid of a weight: scale and zero_point broadcast to it."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int


def weight_grid(weight: Tensor, n_bits: int, rule: WeightRule, split: int = 0) -> Grid:
    """A weight's grid, in float32 or wider. weight: [O, I, ...]; split > 0: [:, :split], [:, split:] have their own."""
    flat = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    spans = column_spans(flat.shape[1], rule.group_size, split * (flat.shape[1] // weight.shape[1]))
    grid = group_grid(flat, spans, n_bits, rule)
    if len(spans) == 1:
        shape = (-1, *[1] * (weight.ndim - 1))
        return replace(grid, scale=grid.scale.reshape(shape), zero_point=grid.zero_point.reshape(shape))
    columns = (values.expand(len(flat), -1) for values in (grid.scale, grid.zero_point))
    scale, zero_point = (spread(values, spans).reshape(weight.shape) for values in columns)
    return replace(grid, scale=scale, zero_point=zero_point)


def group_grid(flat: Tensor, spans: Sequence[tuple[int, int]], n_bits: int, rule: WeightRule) -> Grid:
    """The grid of a matrix [O, M], once for each of the `spans` of its columns: [R, G], R = 1 per tensor, else O."""
    chosen = [choose(flat[:, first:end], n_bits, rule) for first, end in spans]
    scale, zero_point = (torch.stack([pair[k] for pair in chosen], dim=1) for k in (0, 1))
    return Grid(scale, zero_point, *qrange(n_bits, rule.signed))


def spread(values: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """[R, G], one for each span of columns -> [R, M], or [R, 1] where there is one."""
    if len(spans) == 1:
        return values
    return values.repeat_interleave(torch.tensor([end - first for first, end in spans], device=values.device), dim=1)


def column_spans(columns: int, group_size: int | None, split: int) -> list[tuple[int, int]]:
    """(first, end) of the columns of a flattened weight [O, columns] that share a scale: groups, None for all columns.

    split > 0: those before that column and those from it on are apart.
    """
    parts = ((0, split), (split, columns)) if split else ((0, columns),)
    size = group_size or columns
    return [(first, min(first + size, end)) for low, end in parts for first in range(low, end, size)]


def choose(flat: Tensor, n_bits: int, rule: WeightRule) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of a weight matrix: [1] each per tensor, else [O]."""
    rows = flat.reshape(1, -1) if rule.granularity == "per_tensor" else flat
    return choose_qparams(rows, n_bits, estimator=rule.estimator, symmetric=rule.symmetric, official=rule.official)


class ActQuantizer(nn.Module):
    """Uniform affine fake quantization of a tensor with one scale and zero_point (buffers, shape [])."""

    def __init__(self, n_bits: int, signed: bool) -> None:
        super().__init__()
        self.n_bits, self.signed = n_bits, signed
        self.qmin, self.qmax = qrange(n_bits, signed)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.observer: Observer | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape. While observed, the range follows x first."""
        if self.observer is not None:
            scale, zero_point = self.observer.observe(x)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
            if self.observer.rule.through:
                return x
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(moving(fn), recurse)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "uniform", "n_bits": self.n_bits, "signed": self.signed}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ActQuantizer:
        """The module that spec() described."""
        return cls(spec["n_bits"], spec["signed"])

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, signed={self.signed}"


def moving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of nn.Module._apply() where it moves tensors: ranges stay float32 when a network is cast to 16 bits."""
    return lambda values: fn(values) if values.is_meta else values.to(fn(values).device)


class SplitQuantizer(nn.Module):
    """Two quantizers for channels [:split] and [split:] of dim 1 (Q-Diffusion, shortcut-splitting quantization)."""

    def __init__(self, split: int, n_bits: int, signed: bool) -> None:
        super().__init__()
        self.split = split
        self.first, self.second = ActQuantizer(n_bits, signed), ActQuantizer(n_bits, signed)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...] with C > split."""
        return torch.cat([self.first(x[:, : self.split]), self.second(x[:, self.split :])], dim=1)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "split", "split": self.split, "halves": [self.first.spec(), self.second.spec()]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> SplitQuantizer:
        """The module that spec() described."""
        quantizer = cls(spec["split"], n_bits=8, signed=False)
        quantizer.first, quantizer.second = (from_spec(half) for half in spec["halves"])
        return quantizer


def from_spec(spec: dict[str, Any]) -> nn.Module:
    """The quantizer that spec() described. Raises UserError for a kind of a newer version."""
    if spec["kind"] not in KINDS:
        raise UserError(f"quantizer kind {spec['kind']} is unknown; known: {', '.join(KINDS)}")
    return pkgutil.resolve_name(KINDS[spec["kind"]]).from_spec(spec)


def act_quantizers(model: nn.Module) -> list[ActQuantizer]:
    """All activation quantizers below `model`."""
    return [module for module in model.modules() if isinstance(module, ActQuantizer)]


class Observer:
    """Follows the tensors that one quantizer sees, and says which (scale, zero_point) fit them so far."""

    def __init__(self, rule: ActRule, n_bits: int, always_zero: bool = False) -> None:
        self.rule, self.n_bits = rule, n_bits
        self.form = {"symmetric": rule.symmetric and not always_zero, "always_zero": always_zero}
        self.range: tuple[Tensor, Tensor] | None = None
        self.chosen: tuple[Tensor, Tensor] | None = None
        self.side: int | None = None  # PTQ4DM decides whether a tensor is one-sided when it first sees it

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take one batch into account; scale and zero_point, shape []."""
        rows = x.detach().float().reshape(1, -1)
        if self.rule.over == "all":
            self.range = union(self.range, extremes(rows))
            self.chosen = self._choose(torch.stack(self.range, dim=1))
        elif self.rule.over == "ema_search":
            self.side = sidedness(rows) if self.side is None else self.side
            rule = {"official": self.rule.official, "estimator": self.rule.estimator}
            new = ptq4dm_range(rows, self.n_bits, side=self.side, **rule)
            self.range = blend(self.range or new, new, self.rule.momentum)
            self.chosen = ptq4dm_qparams(*self.range, self.n_bits, official=self.rule.official)
        elif self.chosen is None:
            self.range, self.chosen = extremes(rows), self._choose(rows)
        elif self.rule.over == "ema":
            self.range = blend(self.range, extremes(rows), self.rule.momentum)
            self.chosen = range_qparams(*self.range, self.n_bits, **self.form)
        return self.chosen[0].reshape(()), self.chosen[1].reshape(())

    def _choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return choose_qparams(
            rows, self.n_bits, estimator=self.rule.estimator, official=self.rule.official, **self.form
        )


def union(running: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest range that holds both."""
    return new if running is None else (torch.minimum(running[0], new[0]), torch.maximum(running[1], new[1]))
