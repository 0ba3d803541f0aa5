"""Which of many candidate scales reproduces a row best: the releases' float32 arg-min, without their cost.

A release scores each candidate with mean |x - q|^2.4; most of that time is pow. Here candidates are ranked by an
approximate L_p norm through exp(p log), whose distance from the release's arithmetic is bounded per row; only those
which that bound cannot separate from the best are scored again, in the release's order of operations. The ranking runs
over many rows at once, one candidate after the other, on pieces of x that stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = 4 * 2.0**-23  # |approximate - exact| norm, in units of the row's largest magnitude: a few float32 roundings
RELATIVE = 1e-5  # the same for sum, log, exp and root, in units of the norm
TINY = 1e-11  # below this magnitude |error|^2.4 may underflow in float32, so that scores tie: the bound says nothing


@dataclass(frozen=True)
class Candidates:
    """K scales and zero points for each of R rows, [K, R] each, on the codes [qmin, qmax]."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def at(self, rows: Tensor | slice) -> Candidates:
        return Candidates(self.scale[:, rows], self.zero_point[:, rows], self.qmin, self.qmax)


def best_candidate(x: Tensor, candidates: Candidates, p: float) -> tuple[Tensor, Tensor]:
    """(index, found), [R] each: the first candidate of smallest mean |x - fake_quantize(x)|^p per row of x: [R, M].

    A candidate with scale <= 0 or a NaN score never wins; found is False where none is left, and index is 0 there.
    """
    norms = torch.cat([_norms(x[rows], candidates.at(rows), p) for rows in _row_slices(x)], dim=1)
    smallest, index = norms.min(dim=0)
    magnitude = x.abs().amax(dim=1)
    slack = torch.where(magnitude < TINY, torch.inf, 2 * ROUNDINGS * magnitude + RELATIVE * smallest)
    contested = (norms <= smallest + slack) & norms.isfinite()
    contested &= contested.sum(dim=0) > 1
    return torch.where(contested.any(dim=0), _exact_best(x, candidates, contested, p), index), smallest.isfinite()


def best_aligned(x: Tensor, candidates: Candidates) -> Tensor:
    """[R]: the candidate whose fake_quantize(x) has the largest cosine with x, per row of x: [R, M]."""
    dot, square = torch.zeros_like(candidates.scale), torch.zeros_like(candidates.scale)
    for k, (scale, zero_point) in enumerate(zip(candidates.scale, candidates.zero_point, strict=True)):
        for piece in x.split(max(1, _piece(x) // x.shape[0]), dim=1):
            codes = (piece / scale[:, None]).round_().add_(zero_point[:, None])
            codes.clamp_(candidates.qmin, candidates.qmax).sub_(zero_point[:, None])
            dot[k] += (piece * codes).sum(dim=1)
            square[k] += codes.square().sum(dim=1)
    return (dot / square.sqrt()).nan_to_num(nan=-torch.inf).argmax(dim=0)  # nan: all codes are 0


def _norms(x: Tensor, candidates: Candidates, p: float) -> Tensor:
    """[K, r]: approximate (mean |x - fake_quantize(x)|^p)^(1/p), x: [r, M]; inf where scale <= 0 or it is NaN."""
    scale, zero_point = candidates.scale, candidates.zero_point
    inverse = scale.clamp(min=1e-37).reciprocal()  # smaller scales belong to rows below TINY
    grid = torch.stack([inverse, candidates.qmin - zero_point, candidates.qmax - zero_point], dim=1).unsqueeze(-1)
    sums = torch.stack([_power_sum(x, *step, p) for step in grid])
    norms = sums.div_(x.shape[1]).pow_(1 / p).mul_(scale)
    return norms.where((scale > 0) & (norms == norms), torch.inf)


def _power_sum(x: Tensor, inverse: Tensor, lo: Tensor, hi: Tensor, p: float) -> Tensor:
    """sum |v - clip(round(v), lo, hi)|^p, v = x * inverse, over each row of x: [r, M]; inverse, lo, hi: [r, 1]."""
    total = 0
    for piece in x.split(_piece(x), dim=1):
        error = piece * inverse
        error.sub_(error.round().clamp_min_(lo).clamp_max_(hi))
        power = error.mul_(error).add_(1e-30).log_().mul_(p / 2).exp_()  # not exactly 0: log(0) takes 50 times as long
        total = total + power.sum(dim=1)
    return total


def _exact_best(x: Tensor, candidates: Candidates, contested: Tensor, p: float) -> Tensor:
    """[R]: the first of the contested [K, R] candidates with the smallest score."""
    scores = torch.full_like(candidates.scale, torch.inf)
    # One row at a time: torch's pow rounds the last elements of a tensor differently from those it treats as vectors.
    for k, row in contested.nonzero().tolist():
        scale, zero_point = candidates.scale[k, row], candidates.zero_point[k, row]
        codes = (x[row] / scale).round_().add_(zero_point).clamp_(candidates.qmin, candidates.qmax)
        scores[k, row] = (x[row] - codes.sub_(zero_point).mul_(scale)).abs_().pow_(p).mean()
    return scores.argmin(dim=0)


def _row_slices(x: Tensor) -> Iterator[slice]:
    height = max(1, _piece(x) // x.shape[1])
    return (slice(top, top + height) for top in range(0, x.shape[0], height))


def _piece(x: Tensor) -> int:
    """Elements worked on at a time: what two temporaries of a core's cache hold, or enough to fill a GPU."""
    return 2**17 if x.device.type == "cpu" else 2**25
