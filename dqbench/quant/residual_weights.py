"""A weight in two stages: how it is made, and how it is stored (weight storage of kind two_stage)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, lgamma, log, prod
from typing import Any

import torch
from torch import Tensor

from dqbench.errors import UserError
from dqbench.quant import packing, sparse_formats
from dqbench.quant.residual import (
    Codebook,
    StageOne,
    Zeros,
    decode,
    effective_zeros,
    encode,
    fit,
    half_of,
    stage_one,
    worth_storing,
)
from dqbench.quant.storage import Packed
from dqbench.quant.thresholds import SCOPES, Threshold, expected_share, spread, survivors

VERSION = 1


@dataclass(frozen=True)
class Layout:
    """How a two-stage weight is stored: sparse_formats.FORMATS or auto, for stage 1 and for the residual."""

    base: str
    residual: str


@dataclass(frozen=True)
class TwoStageWeight:
    """A weight in two stages: integers and parameters, [O, M] for a weight of O outputs and M elements each."""

    codes: Tensor  # int16 [O, M], stage 1 less its zero point
    scale: Tensor  # [O, G], as stored
    zero_point: Tensor  # uint8 [O, G]; where stage 1 is symmetric, 2^(b1-1), which is not stored
    support: Tensor  # bool [O, M]: where there is a residual
    residual: Tensor  # uint8 [O, M]: its codes, 0 where there is none
    low: Tensor  # [1, 1], [O, 1] or [O, G], as stored
    step: Tensor
    n_bits: int
    symmetric: bool
    codebook: Codebook
    group_size: int

    def spread(self, parameters: Tensor) -> Tensor:
        """Parameters of a scope, broadcastable to [O, M]."""
        return spread(parameters, self.codes.shape[1], self.group_size)

    def base(self) -> Tensor:
        """X1, float32 [O, M]."""
        return self.spread(self.scale.float()) * self.codes

    def correction(self) -> Tensor:
        """R^, float32 [O, M], 0 where there is no residual."""
        low, step = (self.spread(values.float()) for values in (self.low, self.step))
        return decode(self.residual, low, step, self.codebook) * self.support

    def dequantize(self) -> Tensor:
        """X1 + R^."""
        return self.base() + self.correction()

    def storage(self, weight: Tensor, layout: Layout) -> Packed:
        """As stored; `weight` [O, ...] gives the shape and dtype that unpack() returns."""
        base, base_header = self._pack_base(layout.base)
        spare = half_of(self.codebook) if self.codebook.kind == "uniform_sym" else None
        rest, rest_header = sparse_formats.pack(self.residual, self.support, self.codebook.bits, layout.residual, spare)
        tensors = {f"base.{name}": values for name, values in base.items()}
        tensors |= {f"residual.{name}": values for name, values in rest.items()}
        tensors |= {"scale": self.scale, "step": self.step}
        if not self.symmetric:
            tensors["zero_point"] = packing.pack(self.zero_point, self.n_bits)
        if self.codebook.kind != "uniform_sym":
            tensors["low"] = self.low
        header = {"version": VERSION, "shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
        header |= {"bits": self.n_bits, "symmetric": self.symmetric, "group_size": self.group_size}
        header |= {"base": base_header, "residual": rest_header, "codebook": asdict(self.codebook)}
        return Packed.of("two_stage", {name: values.cpu() for name, values in tensors.items()}, header)

    def _pack_base(self, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        codes, present = self.codes.int() + self.spread(self.zero_point).int(), self.codes != 0
        if self.symmetric:
            return sparse_formats.pack(codes, present, self.n_bits, layout, spare=0)
        best = min(sparse_formats.sizes(present, self.n_bits).values())
        if layout == "dense" or layout == "auto" and packing.packed_bytes(codes.numel(), self.n_bits) <= best:
            return sparse_formats.pack(codes, torch.ones_like(present), self.n_bits, "dense")
        return sparse_formats.pack(codes, present, self.n_bits, layout)


def expected_overhead(shape: Sequence[int], stage: StageOne, threshold: Threshold, codebook: Codebook) -> int:
    """Bits that a weight [O, ...] will take beside dense codes of stage 1, as far as its shape and the rules tell.

    The residual: its codes, and as many bits as tell its places from all others that the rule could have chosen. With
    rule=quantile that is less than any format stores, unless the places follow a pattern.
    """
    columns = prod(shape[1:])
    scopes = {scope: scopes_of(shape[0], columns, scope, stage.group_size) for scope in SCOPES}
    kept = [(size, times, size * expected_share(threshold, size)) for size, times in scopes[threshold.scope]]
    rest = sum(times * (choice_bits(size, count) + codebook.bits * count) for size, times, count in kept)
    groups, own = (sum(times for _, times in scopes[scope]) for scope in ("group", codebook.scope))
    numbers = 1 if codebook.kind == "uniform_sym" else 2
    scales = groups * (16 if stage.symmetric else 16 + stage.n_bits)
    return scales + 16 * numbers * own + floor(rest)


def choice_bits(size: int, count: float) -> float:
    """log2 of the number of ways to choose `count` of `size` places: about size times the entropy H(count / size)."""
    return (lgamma(size + 1) - lgamma(count + 1) - lgamma(size - count + 1)) / log(2)


def scopes_of(rows: int, columns: int, scope: str, group_size: int) -> list[tuple[int, int]]:
    """(elements, how many such) of the scopes of a matrix, as per_scope() makes them."""
    if scope == "tensor":
        return [(rows * columns, 1)]
    size = columns if scope == "channel" else group_size
    parts = [(size, rows * (columns // size)), (columns % size, rows)]
    return [(size, times) for size, times in parts if size and times]


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The weight that TwoStageWeight.storage() describes, bit-equal to dequantize()."""
    return restore(tensors, header).dequantize().reshape(header["shape"]).to(getattr(torch, header["dtype"]))


def restore(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> TwoStageWeight:
    """The integers and parameters that TwoStageWeight.storage() describes. Raises UserError for another version."""
    if header["version"] != VERSION:
        raise UserError(f"weight storage two_stage has version {header['version']}; readable: {VERSION}")
    parts = {
        part: {name.removeprefix(f"{part}."): values for name, values in tensors.items() if name.startswith(f"{part}.")}
        for part in ("base", "residual")
    }
    scale, step, n_bits, group_size = tensors["scale"], tensors["step"], header["bits"], header["group_size"]
    zero_point = torch.full(scale.shape, 2 ** (n_bits - 1), dtype=torch.uint8)
    if not header["symmetric"]:
        zero_point = packing.unpack(tensors["zero_point"], scale.numel(), n_bits).reshape(scale.shape)
    base, present = sparse_formats.unpack(parts["base"], header["base"])
    codes = ((base.int() - spread(zero_point, base.shape[1], group_size).int()) * present).to(torch.int16)
    residual, support = sparse_formats.unpack(parts["residual"], header["residual"])
    return TwoStageWeight(
        codes, scale, zero_point, support, residual, tensors.get("low", torch.zeros_like(step)), step, n_bits,
        header["symmetric"], Codebook(**header["codebook"]), group_size,
    )  # fmt: skip


def two_stage(flat: Tensor, stage: StageOne, threshold: Threshold, codebook: Codebook, zeros: Zeros) -> TwoStageWeight:
    """A matrix [O, M], float32, in two stages."""
    size = stage.group_size
    codes, scale, zero_point = stage_one(flat, stage)
    wide = spread(scale.float(), flat.shape[1], size)
    residual = flat - wide * codes
    if threshold.rule == "rd":
        support = worth_storing(residual, flat, threshold.value, codebook, size)
    else:
        support = survivors(residual, wide, threshold, size)
    low, step = fit(residual, support, codebook, size)
    coded = encode(residual, *(spread(values.float(), flat.shape[1], size) for values in (low, step)), codebook)
    if codebook.kind == "uniform_sym":
        support = support & (coded != half_of(codebook))
    codes = codes.masked_fill(effective_zeros(codes, wide, zeros), 0)
    return TwoStageWeight(
        codes, scale, zero_point, support, coded * support, low, step, stage.n_bits, stage.symmetric, codebook, size
    )
