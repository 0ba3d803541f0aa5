"""Two-stage quantization of activations as they pass: a clipped uniform grid, then a sparse residual (RT+ZS).

Static: grid, threshold and codebook come from what calibration shows; dynamic: from each sample itself, so that a
result does not depend on the batch around it. Fake quantization: what would be stored is measured, not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dqbench.errors import UserError, check_choice
from dqbench.quant import sparse_formats
from dqbench.quant.functional import fake_quantize
from dqbench.quant.quantizers import moving
from dqbench.quant.residual import (
    Codebook,
    Zeros,
    bounds,
    check_percentiles,
    check_stage_1,
    decode,
    encode,
    fit,
    grid,
    half_of,
)
from dqbench.quant.thresholds import TIE, Threshold, tau_of

NUMBER_BITS = 32
ONE_BIT = ("dead_zone", 1)  # the codebook without a step
PER_BATCH = 2**15  # elements of each calibration batch that ranges are chosen from, beside the batch's extremes
AT_MOST = 2**22  # of these in all


@dataclass
class ActTwoStage:
    """How activations are quantized. bits: of stage 1, null for bits.act. One grid per tensor, or per sample (dynamic).

    percentiles: the share of x that stage 1 does not clip; of several, static quantizers take the one of the least
    squared error on calibration. format: what the residual is measured as.
    """

    bits: int | None
    symmetric: bool
    percentiles: list[float]
    threshold: Threshold
    codebook: Codebook
    zeros: Zeros
    format: str
    dynamic: bool

    def __post_init__(self) -> None:
        check_choice("method.act.format", self.format, (*sparse_formats.FORMATS, "auto"))
        check_percentiles("method.act.percentiles", self.percentiles)
        check_stage_1("method.act.bits", self.bits)
        if self.dynamic and len(self.percentiles) > 1:
            raise UserError(
                "method.act.dynamic=true chooses nothing by calibration; give one of method.act.percentiles"
            )
        if self.threshold.rule in ("rd", "calib"):
            raise UserError(
                f"method.act.threshold.rule={self.threshold.rule} is for weights; allowed: a rule with a tau"
            )
        if {self.threshold.scope, self.codebook.scope} != {"tensor"}:
            raise UserError("method.act: thresholds and codebooks of activations have scope=tensor")

    @property
    def stored(self) -> tuple[str, ...]:
        """The numbers of Grids that have to be stored to quantize with them; the others are 0, or follow from these."""
        both = {"low": self.codebook.kind != "uniform_sym", "step": (self.codebook.kind, self.codebook.bits) != ONE_BIT}
        both["dead"] = self.zeros.rule == "percentile" and self.zeros.value > 0
        return ("scale", "tau", *(name for name, needed in both.items() if needed))

    def made_bits(self, n_bits: int) -> int:
        """Bits of the numbers that decode one sample, of a dynamic quantizer: thresholds stay with who encodes."""
        decoding = [name for name in self.stored if name not in ("tau", "dead")]
        return NUMBER_BITS * len(decoding) + (0 if self.symmetric else n_bits)


class Grids(NamedTuple):
    """Parameters of both stages, [] or [R, 1] each: tau of the residual, dead: |X1| below which it becomes 0."""

    scale: Tensor
    zero_point: Tensor
    tau: Tensor
    low: Tensor
    step: Tensor
    dead: Tensor


@dataclass
class Meter:
    """What would be stored of the tensors that passed: counts, and bits of the residual."""

    elements: int = 0
    zeros: int = 0  # of stage 1
    entries: int = 0  # of the residual
    bits: int = 0  # of the residual, and of what a dynamic quantizer makes for each sample

    @property
    def overhead_bits(self) -> float:
        """Stored bits per element beside the code of stage 1."""
        return self.bits / max(self.elements, 1)


@dataclass
class Sample:
    """A calibration set's extremes and some of its elements."""

    low: float = float("inf")
    high: float = -float("inf")
    parts: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take a batch into account: PER_BATCH of its elements, drawn from a fixed seed."""
        flat, generator = x.detach().float().flatten(), torch.Generator().manual_seed(len(self.parts))
        self.low, self.high = min(self.low, flat.min().item()), max(self.high, flat.max().item())
        if flat.numel() > PER_BATCH:
            flat = flat[torch.randint(flat.numel(), (PER_BATCH,), generator=generator).to(flat.device)]
        self.parts.append(flat)

    def row(self) -> Tensor:
        """[1, K] with K <= AT_MOST + 2."""
        values = torch.cat(self.parts)
        values = values[:: -(-len(values) // AT_MOST)]
        return torch.cat([values, values.new_tensor([self.low, self.high])]).unsqueeze(0)


class TwoStageQuantizer(nn.Module):
    """Fake quantization of a tensor in two stages. Not an ActQuantizer: its ranges are chosen by collecting().

    Buffers: scale [P], the numbers that rule.stored names; zero_point [], or [0] if symmetric. Both [0] if dynamic.
    """

    def __init__(self, n_bits: int, rule: ActTwoStage) -> None:
        super().__init__()
        self.n_bits, self.rule = n_bits, rule
        self.codebook = replace(rule.codebook, scope="channel")  # a channel is one row here
        self.register_buffer("scale", torch.zeros(0 if rule.dynamic else len(rule.stored)))
        self.register_buffer("zero_point", torch.zeros(0 if rule.dynamic or rule.symmetric else ()))
        self.sample: Sample | None = None
        self.meter: Meter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ...]. While its ranges are collected, it passes as it is."""
        if self.sample is not None:
            self.sample.add(x)
            return x
        rows = x.float().reshape(len(x) if self.rule.dynamic else 1, -1)
        grids = self.choose(rows, self.rule.percentiles[0]) if self.rule.dynamic else self.grids()
        return self.rounded(rows, grids).reshape(x.shape).to(x.dtype)

    def grids(self) -> Grids:
        """The static parameters, shape []."""
        known = dict(zip(self.rule.stored, self.scale.unbind(), strict=True))
        zero = torch.zeros_like(known["scale"])
        known["zero_point"] = zero if self.rule.symmetric else self.zero_point
        if self.rule.zeros.rule == "step":
            known["dead"] = self.rule.zeros.value * known["scale"]
        return Grids(**dict.fromkeys(Grids._fields, zero) | known)

    def rounded(self, rows: Tensor, grids: Grids) -> Tensor:
        """X1 + R^ of rows [R, K], counted where there is a meter."""
        base = self.base(rows, grids)
        residual = rows - base
        codes = encode(residual, grids.low, grids.step, self.codebook)
        support = self.supported(residual, codes, grids)
        base = base.masked_fill(base.abs() < grids.dead, 0)
        if self.meter is not None:
            self.measure(base, support)
        return base + decode(codes, grids.low, grids.step, self.codebook) * support

    def base(self, rows: Tensor, grids: Grids) -> Tensor:
        """X1."""
        return fake_quantize(rows, grids.scale, grids.zero_point, *bounds(self.n_bits, self.rule.symmetric))

    def supported(self, residual: Tensor, codes: Tensor, grids: Grids) -> Tensor:
        """Where there is a residual, bool."""
        support = residual.abs() > grids.tau
        return support & (codes != half_of(self.codebook)) if self.codebook.kind == "uniform_sym" else support

    def choose(self, rows: Tensor, percentile: float) -> Grids:
        """The parameters for rows [R, K], [R, 1] each."""
        scale, zero_point = grid(rows, self.n_bits, self.rule.symmetric, percentile)
        zero = torch.zeros_like(scale)
        base = self.base(rows, Grids(scale, zero_point, zero, zero, zero, zero))
        residual, threshold = rows - base, self.rule.threshold
        is_step = threshold.rule == "step"
        tau = threshold.value * scale / 2 * TIE if is_step else tau_of(residual.abs(), threshold).unsqueeze(1)
        low, step = fit(residual, residual.abs() > tau, self.codebook, rows.shape[1], together=False)
        zeros, magnitude = self.rule.zeros, base.abs()
        by_share = zeros.rule == "percentile" and zeros.value > 0
        dead = torch.quantile(magnitude, zeros.value / 100, dim=1, keepdim=True) if by_share else zeros.value * scale
        return Grids(scale, zero_point, tau, low.float(), step.float(), dead)

    def settle(self) -> None:
        """Take the parameters that fit best what was collected."""
        if not self.sample.parts:
            raise UserError("method=rtzs: a layer did not run on the calibration set; keep it out with method.skip")
        row = self.sample.row()
        tried = [self.choose(row, percentile) for percentile in self.rule.percentiles]
        errors = [(self.rounded(row, grids) - row).square().mean().item() for grids in tried]
        best = tried[errors.index(min(errors))]
        self.scale.copy_(torch.cat([getattr(best, name).flatten() for name in self.rule.stored]))
        if not self.rule.symmetric:
            self.zero_point.copy_(best.zero_point.reshape(()))

    def measure(self, base: Tensor, support: Tensor) -> None:
        """Let the meter count a batch: base and support, bool, [R, K]."""
        sizes = sparse_formats.sizes(support, self.codebook.bits)
        size = min(sizes.values()) if self.rule.format == "auto" else sizes[self.rule.format]
        self.meter.elements += support.numel()
        self.meter.zeros += int((base == 0).sum())
        self.meter.entries += int(support.sum())
        self.meter.bits += 8 * size + self.rule.dynamic * len(support) * self.rule.made_bits(self.n_bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(moving(fn), recurse)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "two_stage", "n_bits": self.n_bits, "rule": asdict(self.rule)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TwoStageQuantizer:
        """The module that spec() described."""
        rule = dict(spec["rule"])
        parts = {"threshold": Threshold, "codebook": Codebook, "zeros": Zeros}
        return cls(spec["n_bits"], ActTwoStage(**rule | {key: kind(**rule[key]) for key, kind in parts.items()}))

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, residual={self.codebook.bits}, dynamic={self.rule.dynamic}"


def two_stage_quantizers(model: nn.Module) -> list[TwoStageQuantizer]:
    """All of them below `model`."""
    return [module for module in model.modules() if isinstance(module, TwoStageQuantizer)]


@contextmanager
def collecting(quantizers: Iterable[TwoStageQuantizer]) -> Iterator[None]:
    """Inside: static quantizers let everything pass and remember it. After: they have their parameters."""
    static = [quantizer for quantizer in quantizers if not quantizer.rule.dynamic]
    for quantizer in static:
        quantizer.sample = Sample()
    try:
        yield
        for quantizer in static:
            quantizer.settle()
    finally:
        for quantizer in static:
            quantizer.sample = None


@contextmanager
def metering(quantizers: Iterable[TwoStageQuantizer]) -> Iterator[list[Meter]]:
    """Inside: each quantizer counts what it would store, in the order given."""
    quantizers = list(quantizers)
    meters = [Meter() for _ in quantizers]
    for quantizer, meter in zip(quantizers, meters, strict=True):
        quantizer.meter = meter
    try:
        yield meters
    finally:
        for quantizer in quantizers:
            quantizer.meter = None
