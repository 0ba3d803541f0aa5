"""Weights as codes into learned centroids: 1-D weighted k-means per group of weights, and how the result is stored.

A weight [O, I, ...] is a matrix [O, M]; `rows` consecutive rows times `columns` consecutive columns share 2^b fp16
centroids. Where a layer's input is a concatenation, groups start anew at its `split`, a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant import packing
from dqbench.quant.kmeans import exact_each, kmeans, midpoints
from dqbench.quant.storage import Packed

KIND, VERSION = "codebook", 1
CENTROID_BITS = 16


@dataclass(frozen=True)
class Sharing:
    """Which weights of a matrix [O, M] have a codebook in common: rows x columns of them; split: a column, 0: none."""

    rows: int
    columns: int
    split: int = 0

    def spans(self, columns: int) -> list[tuple[int, int]]:
        """(first, end) of the columns of each group."""
        parts = ((0, self.split), (self.split, columns)) if self.split else ((0, columns),)
        return [(k, min(k + self.columns, end)) for low, end in parts for k in range(low, end, self.columns)]

    def blocks(self, rows: int) -> int:
        """Groups along the rows; the last may be smaller."""
        return -(-rows // self.rows)

    def codebooks(self, rows: int, columns: int) -> int:
        """Codebooks of a matrix [rows, columns]."""
        return self.blocks(rows) * len(self.spans(columns))


@dataclass(frozen=True)
class Codebook:
    """A matrix [O, M] in codes: uint8 [O, M], centroids fp16 [R, G, 2^b], ascending, for R blocks of rows, G spans."""

    codes: Tensor
    centroids: Tensor
    sharing: Sharing

    @property
    def n_bits(self) -> int:
        return self.centroids.shape[2].bit_length() - 1

    def tables(self, group: int) -> Tensor:
        """The centroids that the rows use in one span, float32 [O, 2^b]."""
        return self.centroids[:, group].float().repeat_interleave(self.sharing.rows, dim=0)[: len(self.codes)]

    def dequantize(self) -> Tensor:
        """float32 [O, M]."""
        spans = self.sharing.spans(self.codes.shape[1])
        parts = [self.tables(g).gather(1, self.codes[:, first:end].long()) for g, (first, end) in enumerate(spans)]
        return torch.cat(parts, dim=1)

    def ordered(self) -> Codebook:
        """The same weights, centroids ascending."""
        ascending, order = self.centroids.sort(dim=2, stable=True)
        codes, ranks = self.codes.clone(), order.argsort(dim=2)
        for g, (first, end) in enumerate(self.sharing.spans(codes.shape[1])):
            rank = ranks[:, g].repeat_interleave(self.sharing.rows, dim=0)[: len(codes)]
            codes[:, first:end] = rank.gather(1, codes[:, first:end].long()).to(torch.uint8)
        return Codebook(codes, ascending, self.sharing)

    def install(self, layer: nn.Module) -> None:
        """Make this a layer's weight, and how that is stored."""
        layer.weight.data = self.dequantize().reshape(layer.weight.shape).to(layer.weight.dtype)
        layer.weight_storage = self.storage(layer.weight)

    def storage(self, weight: Tensor) -> Packed:
        """As stored; `weight` [O, ...] gives the shape and dtype that unpack() returns."""
        tensors = {"codes": packing.pack(self.codes, self.n_bits), "centroids": self.centroids.cpu().contiguous()}
        header = {"version": VERSION, "shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
        header |= {"bits": self.n_bits, "rows": self.sharing.rows}
        header |= {"columns": self.sharing.columns, "split": self.sharing.split}
        return Packed.of(KIND, tensors, header)


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> Tensor:
    """The weight that Codebook.storage() describes, bit-equal to dequantize(). Raises UserError for another version."""
    if header["version"] != VERSION:
        raise UserError(f"weight storage {KIND} has version {header['version']}; readable: {VERSION}")
    shape = torch.Size(header["shape"])
    codes = packing.unpack(tensors["codes"], shape.numel(), header["bits"]).reshape(shape[0], -1)
    sharing = Sharing(header["rows"], header["columns"], header["split"])
    found = Codebook(codes, tensors["centroids"], sharing).dequantize()
    return found.reshape(shape).to(getattr(torch, header["dtype"]))


def overhead_bits(shape: Sequence[int], n_bits: int, sharing: Sharing) -> int:
    """Bits of the centroids of a weight [O, ...]."""
    return CENTROID_BITS * 2**n_bits * sharing.codebooks(shape[0], torch.Size(shape[1:]).numel())


def learn(flat: Tensor, importance: Tensor, n_bits: int, sharing: Sharing, start: str = "quantiles") -> Codebook:
    """Centroids that minimise sum h (w - c)^2 in every group, and the nearest of them for each weight.

    flat: [O, M]; importance h: [M] or [O, M], 0 or more; start: of kmeans.STARTS.
    """
    importance, rows = importance.expand_as(flat), sharing.rows
    spans = sharing.spans(flat.shape[1])
    fit = exact_each if start == "exact" else partial(kmeans, start=start)
    parts = [
        fit(in_blocks(flat[:, first:end], rows, fill="last"), in_blocks(importance[:, first:end], rows), 2**n_bits)
        for first, end in spans
    ]
    centroids = torch.stack(parts, dim=1).half()
    blank = Codebook(torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device), centroids, sharing)
    codes = [nearest(flat[:, first:end], blank.tables(g)) for g, (first, end) in enumerate(spans)]
    return Codebook(torch.cat(codes, dim=1), centroids, sharing)


def in_blocks(matrix: Tensor, rows: int, fill: str = "zero") -> Tensor:
    """[O, N] -> [R, rows N], the last block filled up with zeros or with its last row."""
    missing = -len(matrix) % rows
    extra = matrix[-1:].expand(missing, -1) if fill == "last" else matrix.new_zeros(missing, matrix.shape[1])
    return torch.cat([matrix, extra]).reshape(-1, rows * matrix.shape[1])


def nearest(x: Tensor, tables: Tensor) -> Tensor:
    """Codes, uint8 [O, N], of the nearest of each row's ascending centroids; the lower one where two are as near.

    x: [O, N]; tables: [O, K].
    """
    return torch.searchsorted(midpoints(tables), x.to(tables.dtype).contiguous()).to(torch.uint8)
