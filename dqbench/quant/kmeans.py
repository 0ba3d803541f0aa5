"""Weighted 1-D k-means of many rows at once: Lloyd's iterations from a good start, and the optimum.

Cells of sorted values are what lies between two positions, so that running sums of w, w x and w x^2 give every cell's
mean and error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ITERS, TOLERANCE = 30, 1e-6
STARTS = ("quantiles", "bins", "exact")  # exact: the optimum itself, slow
BINS = 128
AT_ONCE = 8  # rows whose [BINS, BINS] tables stay in a CPU's cache


def midpoints(centroids: Tensor) -> Tensor:
    """Where the nearest of ascending centroids [..., K] changes, [..., K - 1]."""
    return ((centroids[..., 1:] + centroids[..., :-1]) / 2).contiguous()


def kmeans(values: Tensor, weights: Tensor, k: int, start: str = "quantiles") -> Tensor:
    """Weighted 1-D k-means of each row: float32 [G, k], ascending. values, weights: [G, N]. Deterministic.

    start: the quantiles (i + 1/2) / k, or the optimum for at most BINS bins of the values; then at most 30 iterations,
    fewer where no centroid moves by 1e-6 of the range; a centroid without weight splits the cell of the largest error.
    """
    cells = Cells.of(values, weights)
    centroids = cells.quantiles(k) if start == "quantiles" else cells.best_of_bins(k)
    span = (cells.values[:, -1:] - cells.values[:, :1]).clamp(min=1e-30)
    for _ in range(ITERS + k):  # a repair takes an iteration
        moved = cells.improve(centroids)
        done = ((moved - centroids).abs() <= TOLERANCE * span).all()
        centroids = moved
        if done:
            break
    return centroids.float()


@dataclass(frozen=True)
class Cells:
    """Sorted values [G, N] in double and running sums [G, N + 1] of w, w x, w x^2, all below a position."""

    values: Tensor
    sums: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Cells:
        """Rows without any weight count every value once."""
        x, order = values.double().sort(dim=1, stable=True)
        w = weights.double().gather(1, order)
        w = torch.where(w.sum(1, keepdim=True) > 0, w, 1.0)
        sums = (F.pad(part.cumsum(1), (1, 0)) for part in (w, w * x, w * x * x))
        return cls(x, tuple(sums))

    def quantiles(self, k: int) -> Tensor:
        """The values below which (i + 1/2) / k of a row's weight lies."""
        weight = self.sums[0]
        wanted = (torch.arange(k, device=weight.device) + 0.5) / k * weight[:, -1:]
        index = torch.searchsorted(weight[:, 1:].contiguous(), wanted).clamp(max=self.values.shape[1] - 1)
        return self.values.gather(1, index)

    def best_of_bins(self, k: int) -> Tensor:
        """The best k centroids whose cells end where bins do, half of them of equal width, half of equal counts."""
        count, share = self.values.shape[1], torch.linspace(0, 1, BINS // 2 + 1, device=self.values.device).double()
        low, high = self.values[:, :1], self.values[:, -1:]
        equal = torch.searchsorted(self.values, (low + (high - low) * share).contiguous())
        ends = torch.cat([equal, (share * count).round().long().expand(len(equal), -1)], dim=1).sort(dim=1).values
        ends[:, 0], ends[:, -1] = 0, count
        sums = torch.stack([part.gather(1, ends) for part in self.sums])
        return torch.cat([best_means(part, k) for part in sums.split(AT_ONCE, dim=1)])

    def improve(self, centroids: Tensor) -> Tensor:
        """The mean of each centroid's cell; one that has no weight is put to use."""
        inner = torch.searchsorted(self.values, midpoints(centroids))
        ends = F.pad(inner, (1, 1))
        ends[:, -1] = self.values.shape[1]
        weight, first, second = (part.gather(1, ends).diff(dim=1) for part in self.sums)
        means = torch.where(weight > 0, first / weight.clamp(min=1e-300), centroids)
        errors = (second - first * means).clamp(min=0)
        return split_worst(means, weight <= 0, errors).sort(dim=1).values


def split_worst(means: Tensor, empty: Tensor, errors: Tensor) -> Tensor:
    """Centroids [G, k], one that is empty moved to that of the cell of the largest error, whose values part there."""
    worst, spare = errors.argmax(1, keepdim=True), empty.double().argmax(1, keepdim=True)
    useful = empty.any(1, keepdim=True) & (errors.gather(1, worst) > 0)
    return means.scatter(1, spare, torch.where(useful, means.gather(1, worst), means.gather(1, spare)))


def best_means(sums: Tensor, k: int) -> Tensor:
    """The means of the k cells of least total error that begin and end at positions in sums [3, G, P]: [G, k]."""
    means, cost = segments(sums)
    cuts = best_cuts(cost, k)
    return means.flatten(1).gather(1, cuts[:, :-1] * means.shape[2] + cuts[:, 1:]).sort(dim=1).values


def segments(sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, weighted squared error), [G, P, P] each, of what lies between any two of P positions in running sums.

    Entry [g, i, j] is of positions i to j; an error of infinity, and no mean, where i > j. Nothing has no error.
    """
    weight, first, second = (part[:, None, :] - part[:, :, None] for part in sums)
    backwards = torch.ones_like(weight[0], dtype=torch.bool).tril(-1)
    means = first / weight.clamp_(min=1e-300)
    return means, second.sub_(first.mul_(means)).clamp_(min=0).masked_fill_(backwards, torch.inf)


def best_cuts(cost: Tensor, k: int) -> Tensor:
    """The positions 0 = p_0 <= ... <= p_k = P - 1 of least total cost, [G, k + 1], by dynamic programming.

    D[m, j] = min over i of D[m - 1, i] + cost[i, j]. cost: [G, P, P].
    """
    best, starts = cost[:, 0], []
    for _ in range(k - 1):
        best, start = (best[:, :, None] + cost).min(dim=1)
        starts.append(start)
    ends = [torch.full((len(cost), 1), cost.shape[1] - 1, device=cost.device)]
    for start in reversed(starts):
        ends.append(start.gather(1, ends[-1]))
    return torch.cat([torch.zeros_like(ends[0]), *reversed(ends)], dim=1)


def exact_each(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """The centroids of least weighted squared error of each row of [G, N], float32 [G, k], ascending."""
    found = [exact(x[None], w[None], k) for x, w in zip(values, weights, strict=True)]
    return torch.cat(found).float()


def exact(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """exact_each() for few rows, all at once; takes G N^2 memory. Unused centroids repeat a used one."""
    cells = Cells.of(values, weights)
    means, cost = segments(cells.sums)
    cuts = best_cuts(cost, k)
    flat = cuts[:, :-1] * means.shape[2] + cuts[:, 1:]
    weight = cells.sums[0].gather(1, cuts).diff(dim=1)
    found = means.flatten(1).gather(1, flat)
    used = found.masked_fill(weight <= 0, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(weight > 0, found, used).sort(dim=1).values
