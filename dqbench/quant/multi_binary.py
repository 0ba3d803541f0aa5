"""DAQ (Quant-dLLM, arXiv:2510.03274): a block of a weight as a sum of binary planes with row and column scales.

W^ = sum_k (r_k c_k^T) * B_k, B_k in {-1, 1}. Planes start greedily; then r_k and c_k are least-squares answers in turn,
and all signs together the nearest of the 2^K sums. Each step minimises sum E (W - W^)^2 over what it changes, so that
the objective never rises, but for eps in the denominators (1e-8 beside sums of about a block's rows or columns, as
blocks are scaled to a mean of about 1), for rounding of the arithmetic, and for the last step: r and c are rounded to
the 16 bits they are stored in (2^-11 of each), and the signs chosen again for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqbench.errors import UserError, check_choice
from dqbench.quant.packing import dtype_of, name_of
from dqbench.quant.storage import Packed

KIND, VERSION = "multi_binary", 1
TINY = 1e-30
PIECE = 2**18  # elements that are refined together on a CPU: what stays in a core's cache


@dataclass
class Refinement:
    """How planes are refined. iterations: of r, c and the signs, 0 keeps the greedy start; eps: see above.

    single: resolved | fixed, the signs of a block with one plane. As r c > 0 there, both are sign(W) (paper | release).
    """

    iterations: int
    eps: float
    single: str

    def __post_init__(self) -> None:
        check_choice("daq.single", self.single, ("resolved", "fixed"))
        if self.iterations < 0 or not self.eps >= 0:
            given = f"daq.iterations={self.iterations}, daq.eps={self.eps}"
            raise UserError(f"{given}: out of range; allowed: 0 or more each")


@dataclass(frozen=True)
class Planes:
    """Binary planes of G blocks [n, w]. signs: bool [G, K, n, w], true: 1; rows [G, K, n], columns [G, K, w]: fp16."""

    signs: Tensor
    rows: Tensor
    columns: Tensor

    def dequantize(self) -> Tensor:
        """W^, float32 [G, n, w]; the product of two fp16 numbers is exact in it, so a bit pattern fixes the result."""
        total = torch.zeros((), device=self.signs.device)
        for k in range(self.signs.shape[1]):
            plane = outer(self.rows[:, k].float(), self.columns[:, k].float())
            total = total + torch.where(self.signs[:, k], plane, -plane)
        return total

    def __iter__(self) -> Iterator[Planes]:
        """The blocks one by one."""
        for parts in zip(self.signs, self.rows, self.columns, strict=True):
            yield Planes(*(part.unsqueeze(0) for part in parts))


def approximate(blocks: Tensor, order: int, emphasis: Tensor | None, rule: Refinement) -> Planes:
    """K = `order` planes of every block of `blocks` [G, n, w], floating; emphasis: E [G, n, w] > 0, None: 1."""
    size = max(1, PIECE // blocks[0].numel()) if blocks.device.type == "cpu" else len(blocks)
    pieces = [slice(first, first + size) for first in range(0, len(blocks), size)]
    found = [
        _approximate(blocks[piece], order, None if emphasis is None else emphasis[piece], rule) for piece in pieces
    ]
    return found[0] if len(found) == 1 else Planes(*map(torch.cat, zip(*map(_parts, found), strict=True)))


def _parts(planes: Planes) -> tuple[Tensor, Tensor, Tensor]:
    return planes.signs, planes.rows, planes.columns


def _approximate(blocks: Tensor, order: int, emphasis: Tensor | None, rule: Refinement) -> Planes:
    unit = torch.exp2(blocks.abs().mean(dim=(-2, -1), keepdim=True).clamp(min=TINY).log2().round())
    solver = Solver(blocks / unit, order, emphasis, rule.eps)
    resolve = order > 1 or rule.single == "resolved"
    for _ in range(rule.iterations):
        for k in range(order):
            solver.update_scales(k)
        if resolve:
            solver.update_signs()
    solver.round_scales(blocks, unit.squeeze(-1))
    if resolve and rule.iterations:
        solver.update_signs()
    return solver.planes()


class Solver:
    """The state of the alternation: signs +-1 [G, n, w], r [G, n], c [G, w] of each plane, and W - W^."""

    def __init__(self, weight: Tensor, order: int, emphasis: Tensor | None, eps: float) -> None:
        """Planes one after the other, each of what the ones before left: r = mean_j |R|, c = mean_i |R| / r."""
        self.weight, self.emphasis, self.eps = weight, emphasis, eps
        self.signs: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.residual = weight.clone()
        for k in range(order):
            magnitude = self.residual.abs()
            self.rows.append(magnitude.mean(dim=-1))
            self.columns.append((magnitude / self.rows[k].clamp(min=TINY).unsqueeze(-1)).mean(dim=-2))
            self.signs.append(sign(self.residual))
            self.residual -= self.plane(k)

    def plane(self, k: int) -> Tensor:
        """(r_k c_k^T) * B_k, [G, n, w]."""
        return outer(self.rows[k], self.columns[k]).mul_(self.signs[k])

    def objective(self) -> Tensor:
        """sum E (W - W^)^2 of each block, [G]."""
        squares = (self.weight - sum(self.plane(k) for k in range(len(self.signs)))).square_()
        return (squares if self.emphasis is None else squares * self.emphasis).sum(dim=(-2, -1))

    def update_scales(self, k: int) -> None:
        """Least squares for r_k, then for c_k, on T = W - the other planes: r = [E T B] c / ([E] c^2 + eps)."""
        target = self.residual.add_(self.plane(k))
        aligned = target * self.signs[k]
        if self.emphasis is not None:
            aligned.mul_(self.emphasis)
        c = self.columns[k]
        self.rows[k] = r = along(aligned, c) / (self._energy(c, 1) + self.eps)
        self.columns[k] = along(aligned.mT, r) / (self._energy(r, 0) + self.eps)
        self.residual = target.sub_(self.plane(k))

    def _energy(self, scales: Tensor, axis: int) -> Tensor:
        """[E] c^2, [G, n], for axis 1; [E]^T r^2, [G, w], for axis 0; [G, 1] where E is 1."""
        squares = scales.square()
        if self.emphasis is None:
            return squares.sum(dim=-1, keepdim=True)
        return along(self.emphasis if axis else self.emphasis.mT, squares)

    def update_signs(self) -> None:
        """The signs whose sum of planes is nearest to W, of all 2^K; E cannot change which that is.

        s and -s are decided by the sign of W, which leaves 2^(K-1) sums to compare by |W| - |sum|.
        """
        magnitudes = [outer(r, c) for r, c in zip(self.rows, self.columns, strict=True)]
        size, best, total = self.weight.abs(), None, None
        others: list[Tensor | float] = [1.0] * (len(magnitudes) - 1)
        for choice in product((1.0, -1.0), repeat=len(others)):
            value = magnitudes[0].clone()
            for own, magnitude in zip(choice, magnitudes[1:], strict=True):
                value.add_(magnitude, alpha=own)
            error = (size - value.abs()).abs_()
            if best is None:
                best, total = error, value
                continue
            closer = error < best
            best, total = torch.minimum(best, error), torch.where(closer, value, total)
            others = [torch.where(closer, own, other) for own, other in zip(choice, others, strict=True)]
        flip = sign(self.weight * total)  # of a product that underflows the sign is still there
        self.signs = [flip, *(flip * other for other in others)]
        self.residual = self.weight - flip * total

    def round_scales(self, weight: Tensor, unit: Tensor) -> None:
        """r and c as fp16 holds them, of `weight`, which is `unit` [G, 1] times the one that they were found for.

        r -> a r, c -> c / a makes their means equal first, so that neither underflows.
        """
        self.weight = weight
        for k, (r, c) in enumerate(zip(self.rows, self.columns, strict=True)):
            means = (values.abs().mean(dim=-1, keepdim=True).clamp(min=TINY) for values in (c, r * unit))
            balance = torch.div(*means).sqrt()
            self.rows[k], self.columns[k] = ((r * unit * balance).half().to(r.dtype), (c / balance).half().to(c.dtype))
        self.residual = weight - sum(self.plane(k) for k in range(len(self.signs)))

    def planes(self) -> Planes:
        """What is stored."""
        signs = torch.stack([signs > 0 for signs in self.signs], dim=1)
        return Planes(signs, torch.stack(self.rows, dim=1).half(), torch.stack(self.columns, dim=1).half())


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """r c^T, [..., n, w]."""
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)


def along(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [..., n, w] times vector [..., w]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def sign(x: Tensor) -> Tensor:
    """1 or -1, in x's dtype; of 0 that of its sign bit."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x)


def store(blocks: Sequence[Planes], weight: Tensor) -> Packed:
    """The storage of a weight [O, ...] that consists of `blocks`, from left to right: signs as bits, scales in fp16.

    Tensors: signs, bits of all blocks [K, n, w] in a row, least significant first; rows [sum K, n]; columns, flat;
    orders uint8, K of each block.
    """
    bits = np.concatenate([planes.signs.cpu().numpy().ravel() for planes in blocks])
    tensors = {
        "signs": torch.from_numpy(np.packbits(bits, bitorder="little")),
        "rows": torch.cat([planes.rows[0] for planes in blocks]).cpu(),
        "columns": torch.cat([planes.columns.flatten() for planes in blocks]).cpu(),
        "orders": torch.tensor([planes.signs.shape[1] for planes in blocks], dtype=torch.uint8),
    }
    header = {"version": VERSION, "shape": list(weight.shape), "dtype": name_of(weight.dtype)}
    return Packed.of(KIND, tensors, header | {"block_size": blocks[0].signs.shape[-1]})


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The weight that store() was given, bit-equal to what its planes dequantize to. UserError for another version."""
    if header["version"] != VERSION:
        raise UserError(f"weight storage {KIND} has version {header['version']}; readable: {VERSION}")
    shape, orders = header["shape"], tensors["orders"].tolist()
    outputs, inputs = shape[0], prod(shape[1:])
    widths = widths_of(inputs, header["block_size"])
    parts = [order * width for order, width in zip(orders, widths, strict=True)]
    bits = np.unpackbits(tensors["signs"].numpy(), count=outputs * sum(parts), bitorder="little")
    signs = torch.from_numpy(bits.view(bool)).split([outputs * part for part in parts])
    rows, columns = tensors["rows"].split(orders), tensors["columns"].split(parts)
    blocks = [
        Planes(bits.reshape(1, order, outputs, width), row.unsqueeze(0), column.reshape(1, order, width))
        for bits, row, column, order, width in zip(signs, rows, columns, orders, widths, strict=True)
    ]
    return torch.cat([planes.dequantize()[0] for planes in blocks], dim=1).reshape(shape).to(dtype_of(header["dtype"]))


def overhead_bits(outputs: int, widths: Sequence[int], order: int) -> int:
    """What is stored beside the signs of blocks of `widths` columns, `order` planes on average: scales, orders.

    Together: K (1 + 16/w + 16/n) bits per weight for blocks [n, w], and 8 bits a block.
    """
    return 16 * order * (outputs * len(widths) + sum(widths)) + 8 * len(widths)


def widths_of(columns: int, block_size: int) -> list[int]:
    """Columns of each block; the last may be narrower."""
    return [min(block_size, columns - first) for first in range(0, columns, block_size)]
