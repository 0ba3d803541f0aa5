"""A weight on a uniform grid as it is stored: packed integer codes, with scales and zero points once per group.

weight = scale (code - zero_point), codes in [0, 2^b): one product, rounded once, which is how functional.fake_quantize
and AdaRound bake it, so unpack() is bit-equal. Columns of the matrix [O, M] that share a scale: `group_size` in a row,
or all; where there is a split (a column, 0: none), of those before it and of those from it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dqbench.errors import UserError
from dqbench.quant import packing
from dqbench.quant.quantizers import Grid, WeightRule, column_spans, spread
from dqbench.quant.storage import Packed

KIND, VERSION = "uniform", 1
PIECE = 2**18  # elements that are coded together


def store(weight: Tensor, grid: Grid, rule: WeightRule, split: int) -> Packed | None:
    """The storage of `weight` [O, I, ...], baked on `grid`; None where it is not bit-equal to what that would unpack.

    rule: what the grid was chosen by; split: in input channels. scale, zero_point: [R, G], R = 1 per tensor, else O.
    """
    columns = weight.shape[1:].numel()
    split *= columns // weight.shape[1]
    firsts = [first for first, _ in column_spans(columns, rule.group_size, split)]
    rows = slice(1 if rule.granularity == "per_tensor" else None)
    full = (values.expand(weight.shape).flatten(1) for values in (grid.scale, grid.zero_point))
    scale, zero_point = (values[rows, firsts] for values in full)
    return store_groups(weight, replace(grid, scale=scale, zero_point=zero_point), rule.group_size, split)


def store_groups(weight: Tensor, grid: Grid, group_size: int | None, split: int) -> Packed | None:
    """store() where scale and zero_point of the grid are [R, G] already; split: in columns."""
    flat, n_bits = weight.detach().cpu().flatten(1), (grid.qmax - grid.qmin).bit_length()
    spans = column_spans(flat.shape[1], group_size, split)
    scale, zero_point = grid.scale.cpu(), grid.zero_point.cpu().long() - grid.qmin
    codes = codes_of(flat, scale, zero_point, spans, n_bits)
    if codes is None or width_of(zero_point, n_bits) > packing.MAX_WIDTH:
        return None
    packed, place = pack_whole(zero_point, n_bits)
    header = {"version": VERSION, "shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    header |= {"bits": n_bits, "group_size": group_size, "split": split, "zero_point": place}
    tensors = {"codes": packing.pack(codes, n_bits), "scale": scale.contiguous(), "zero_point": packed}
    found = Packed.of(KIND, tensors, header)
    return found if torch.equal(unpack(tensors, header), weight.detach().cpu()) else None


def codes_of(
    flat: Tensor, scale: Tensor, zero_point: Tensor, spans: Sequence[tuple[int, int]], n_bits: int
) -> Tensor | None:
    """Codes [O, M] of a baked weight, uint8 where b <= 8; None where one is not in [0, 2^b)."""
    codes = torch.empty(flat.shape, dtype=torch.uint8 if n_bits <= 8 else torch.int64)
    for rows in pieces(flat):
        own_scale, own_zero = (spread(of_rows(values, rows), spans) for values in (scale, zero_point))
        part = (flat[rows] / own_scale).round().long() + own_zero
        if not fits(part, n_bits):
            return None
        codes[rows] = part
    return codes


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The weight that store() was given. Raises UserError for another version."""
    if header["version"] != VERSION:
        raise UserError(f"weight storage {KIND} has version {header['version']}; readable: {VERSION}")
    shape, scale = header["shape"], tensors["scale"]
    count = torch.Size(shape).numel()
    codes = packing.unpack(tensors["codes"], count, header["bits"]).reshape(shape[0], -1)
    zero_point = unpack_whole(tensors["zero_point"], scale.numel(), header["zero_point"]).reshape(scale.shape)
    spans = column_spans(codes.shape[1], header["group_size"], header["split"])
    weight = torch.empty(codes.shape, dtype=getattr(torch, header["dtype"]))
    for rows in pieces(codes):
        whole = codes[rows].long() - spread(of_rows(zero_point, rows), spans)
        weight[rows] = whole.to(scale.dtype) * spread(of_rows(scale, rows), spans)
    return weight.reshape(shape)


def pieces(matrix: Tensor) -> Iterator[slice]:
    """Its rows, as many at a time as PIECE elements are: what is computed of them in 64 bits is small then."""
    size = max(1, PIECE // max(1, matrix.shape[1]))
    return (slice(first, first + size) for first in range(0, len(matrix), size))


def of_rows(values: Tensor, rows: slice) -> Tensor:
    """Some rows of [R, G]; all have the one there is where R = 1."""
    return values if len(values) == 1 else values[rows]


def fits(codes: Tensor, n_bits: int) -> bool:
    """Whether codes lie in [0, 2^b)."""
    return not codes.numel() or bool(codes.min() >= 0) and int(codes.max()) < 2**n_bits


def width_of(values: Tensor, n_bits: int) -> int:
    """Bits that whole numbers take: n_bits, more where they do not lie in [0, 2^n_bits)."""
    low, high = (int(end) for end in torch.aminmax(values))
    return max(n_bits, (high - min(low, 0)).bit_length())


def pack_whole(values: Tensor, n_bits: int) -> tuple[Tensor, dict[str, int]]:
    """(bytes, {bits, low}) of whole numbers, each as value - low; n_bits and 0 where they lie in [0, 2^n_bits)."""
    if not torch.equal(values.long().to(values.dtype), values):
        raise UserError("zero points that are no whole numbers cannot be packed")
    values = values.long()
    width, low = width_of(values, n_bits), min(int(values.min()), 0)
    if width > packing.MAX_WIDTH:
        raise UserError(f"zero points over a range of {width} bits cannot be packed; allowed: {packing.MAX_WIDTH}")
    return packing.pack(values - low, width), {"bits": width, "low": low}


def unpack_whole(packed: Tensor, count: int, place: Mapping[str, int]) -> Tensor:
    """The whole numbers, int64 [count], that pack_whole() was given."""
    return packing.unpack(packed, count, place["bits"]).long() + place["low"]
