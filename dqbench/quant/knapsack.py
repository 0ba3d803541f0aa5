"""Bit-widths for layers under a budget of bits per weight, met exactly: greedy by marginal gain, or the optimum.

Layer l has sizes[l] weights and loses losses[l][b] at b bits. The total sum sizes[l] b_l is the largest one that the
widths can make without exceeding budget x sum sizes; where every layer can have `budget` bits it is the budget itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import floor, gcd

import numpy as np

from dqbench.errors import UserError

Losses = Sequence[Mapping[int, float]]
MAX_TOTAL = 50_000_000  # units of the exact method's table, layers x totals
ROUNDING = 1e-9


def allocate(losses: Losses, sizes: Sequence[int], budget: float, method: str) -> list[int]:
    """The width of each layer; method: greedy | exact. Raises UserError for a budget that no choice meets."""
    problem = Problem(losses, sizes, budget)
    return {"greedy": greedy, "exact": exact}[method](problem)


class Problem:
    """Widths, extra units of bits that they cost over the smallest, and the total that is to be met."""

    def __init__(self, losses: Losses, sizes: Sequence[int], budget: float) -> None:
        self.losses, self.widths = losses, [sorted(own) for own in losses]
        self.unit = reduce(gcd, sizes)
        self.extra = [
            [size // self.unit * (b - own[0]) for b in own] for size, own in zip(sizes, self.widths, strict=True)
        ]
        least = sum(size // self.unit * own[0] for size, own in zip(sizes, self.widths, strict=True))
        most = least + sum(own[-1] for own in self.extra)
        low, high = (total * self.unit / sum(sizes) for total in (least, most))
        wanted = floor(budget * (sum(sizes) // self.unit) + ROUNDING)
        if not low - ROUNDING <= budget <= high + ROUNDING:
            raise UserError(f"a budget of {budget:g} bits per weight cannot be met; allowed here: {low:g} to {high:g}")
        self.total = (self.reach(range(len(sizes))) & ((2 << (wanted - least)) - 1)).bit_length() - 1

    def reach(self, layers: Sequence[int]) -> int:
        """Bit t of the result: whether the layers can take t units in all."""
        found = 1
        for layer in layers:
            found = reduce(int.__or__, (found << extra for extra in self.extra[layer]))
        return found

    def chosen(self, picks: Sequence[int]) -> list[int]:
        """The widths at these positions."""
        return [own[pick] for own, pick in zip(self.widths, picks, strict=True)]


def exact(problem: Problem) -> list[int]:
    """The choice of least loss among those that meet the total, by dynamic programming over totals."""
    size = problem.total + 1
    if size * len(problem.losses) > MAX_TOTAL:
        raise UserError(f"{size} totals x {len(problem.losses)} layers are too many for mixed.method=exact; use greedy")
    best, picks = np.full(size, np.inf), []
    best[0] = 0
    for own, widths, extras in zip(problem.losses, problem.widths, problem.extra, strict=True):
        options = np.full((len(widths), size), np.inf)
        for row, width, extra in zip(options, widths, extras, strict=True):
            if extra < size:
                row[extra:] = best[: size - extra] + own[width]
        picks.append(options.argmin(axis=0).astype(np.uint8))
        best = options.min(axis=0)
    found, left = [], problem.total
    for pick, extras in zip(reversed(picks), reversed(problem.extra), strict=True):
        found.append(int(pick[left]))
        left -= extras[found[-1]]
    return problem.chosen(found[::-1])


def greedy(problem: Problem) -> list[int]:
    """From the smallest widths on, the raise that gains most per bit, among those after which the total can be met."""
    picks, left = [0] * len(problem.losses), problem.total
    while left:
        for layer, pick in by_gain(problem, picks):
            spent = problem.extra[layer][pick] - problem.extra[layer][picks[layer]]
            if spent <= left and can_be_met(problem, picks, layer, pick, left - spent):
                picks[layer], left = pick, left - spent
                break
    return problem.chosen(picks)


def by_gain(problem: Problem, picks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(layer, position) of all raises, the largest gain per bit first."""
    raises = []
    for layer, (own, widths, extras) in enumerate(zip(problem.losses, problem.widths, problem.extra, strict=True)):
        now = picks[layer]
        for pick in range(now + 1, len(widths)):
            gain = (own[widths[now]] - own[widths[pick]]) / (extras[pick] - extras[now])
            raises.append((-gain, layer, pick))
    return ((layer, pick) for _, layer, pick in sorted(raises))


def can_be_met(problem: Problem, picks: Sequence[int], layer: int, pick: int, left: int) -> bool:
    """Whether raises from here on, with `layer` at `pick`, can take exactly `left` units."""
    found = 1
    for k, extras in enumerate(problem.extra):
        now = pick if k == layer else picks[k]
        found = reduce(int.__or__, (found << (extra - extras[now]) for extra in extras[now:]))
        found &= (2 << left) - 1
    return bool(found >> left & 1)
