"""Block compensation: what a block of columns loses by rounding, the columns still to come make up for.

GPTQ (Frantar et al. 2023, arXiv:2210.17323): with H^-1 = U^T U, column j's error e_j = (w_j - q_j) / U_jj moves every
later column by -e_j U_j. GPTAQ (Li et al. 2025, arXiv:2504.02692) also makes up for inputs x that are not those of the
full-precision network, x_ref: later columns move by w_j P_j, P = triu(D U^T, 1) U, D = 2/N sum (x_ref - x) x^T.
Updates wait for the end of a block, which changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dqbench.errors import UserError
from dqbench.quant.hessian import inverse_factor

Span = tuple[int, int]  # (first, end) of a block's columns


@dataclass
class Damping:
    """ridge: added to the second moments, in units of their mean diagonal; asymmetry: GPTAQ's alpha, 0 for GPTQ."""

    ridge: float
    asymmetry: float

    def __post_init__(self) -> None:
        if not (0 < self.ridge < float("inf")):
            raise UserError(f"damping.ridge={self.ridge} is out of range; allowed: more than 0, e.g. 0.01")
        if not (0 <= self.asymmetry <= 1):
            raise UserError(f"damping.asymmetry={self.asymmetry} is out of range; allowed: 0 to 1")


@dataclass(frozen=True)
class Curvature:
    """How columns make up for each other. factor: U [M, M], upper triangular; drift: P [M, M], strictly so, or None."""

    factor: Tensor
    drift: Tensor | None

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor | None, damping: Damping) -> Curvature:
        """hessian: H [M, M], overwritten by U; cross: D [M, M], where the inputs' references are known."""
        factor = inverse_factor(hessian, damping.ridge)
        if cross is None or not damping.asymmetry:
            return cls(factor, None)
        return cls(factor, (cross @ factor.T).triu_(1).mul_(damping.asymmetry) @ factor)

    def within(self, span: Span) -> Curvature:
        """Of the columns of one block among themselves."""
        inside = slice(*span)
        return Curvature(self.factor[inside, inside], None if self.drift is None else self.drift[inside, inside])


class RoundedBlock(NamedTuple):
    """A block after rounding, [O, w] each: its values, the errors e that move later blocks, the weights it had."""

    values: Tensor
    error: Tensor
    seen: Tensor


def compensate(
    weight: Tensor, curvature: Curvature, spans: list[Span], round_block: Callable[[Tensor, Span], RoundedBlock]
) -> Tensor:
    """`weight` [O, M], float32, rounded block by block from left to right."""
    rest, rounded = weight.clone(), torch.empty_like(weight)
    for first, end in spans:
        block = round_block(rest[:, first:end], (first, end))
        rounded[:, first:end] = block.values
        rest[:, end:].addmm_(block.error, curvature.factor[first:end, end:], alpha=-1)
        if curvature.drift is not None:
            rest[:, end:].addmm_(block.seen, curvature.drift[first:end, end:])
    return rounded


def round_columns(block: Tensor, curvature: Curvature, round_column: Callable[[Tensor, int], Tensor]) -> RoundedBlock:
    """GPTQ inside a block [O, w]: a column [O] at a time, by round_column(weights, position in the block).

    curvature: Curvature.within() the block.
    """
    columns = block.T.clone()  # [w, O]: a column is contiguous
    values, errors, factor = torch.empty_like(columns), torch.empty_like(columns), curvature.factor
    for j, column in enumerate(columns):
        values[j] = round_column(column, j)
        errors[j] = (column - values[j]) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        if curvature.drift is not None:
            columns[j + 1 :].addr_(curvature.drift[j, j + 1 :], column)
    return RoundedBlock(values.T, errors.T, columns.T)


def block_error(seen: Tensor, values: Tensor, factor: Tensor, kind: str) -> Tensor:
    """e [O, w] of a block that was rounded at once; factor: U [w, w] of its columns.

    diagonal: (w - q) / diag U, as the release of Quant-dLLM has it (arXiv:2510.03274), which would be GPTQ's if the
    columns of the block had moved in turn. exact: (w - q) U^-1, the least-squares answer to the block's change.
    """
    change = seen - values
    if kind == "diagonal":
        return change / factor.diagonal()
    return torch.linalg.solve_triangular(factor, change, upper=True, left=False)


def spans_of(columns: int, width: int) -> list[Span]:
    """Blocks of `width` columns from left to right; the last may be narrower."""
    return [(first, min(first + width, columns)) for first in range(0, columns, width)]
