"""How scale and zero_point are chosen: the rows of x [R, M] are independent ranges; every result is a tensor [R].

`official` reproduces the authors' releases (Q-Diffusion, arXiv:2302.04304; PTQ4DM, arXiv:2211.15736) where they differ
from the sane form, which is the default:

| case                | default                                    | official                                          |
|---------------------|--------------------------------------------|---------------------------------------------------|
| minmax, asymmetric  | scale and zero_point of a range that has 0 | scale of the raw extremes, so low > 0 clips       |
| minmax, always_zero | scale = high / (2^b - 1)                   | scale of the raw extremes                         |
| scaled_minmax       | the range is multiplied by (b + 2) / 8     | asymmetric: only zero_point sees the factor       |
| mse, symmetric      | [-T, T] shrinks on the signed grid         | searched on [0, 2^(b-1) - 2], then used signed    |
| mse, scale < 1e-8   | minmax instead                             | kept; minmax only where no candidate has a score  |
| ptq4dm, two-sided   | zero_point = 2^(b-1)                       | -round(-T / scale), a tie: 2^(b-1) or 2^(b-1) - 1 |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqbench.quant.functional import qrange
from dqbench.quant.range_search import Candidates, best_aligned, best_candidate

PTQ4DM = {"ptq4dm": 2.4, "ptq4dm_l1": 1.0, "ptq4dm_cosine": None}  # -> p of the error's L_p; None: its cosine distance
ESTIMATORS = ("minmax", "scaled_minmax", "percentile", "mse", *PTQ4DM)
SCALE_FLOOR = 1e-8
Pair = tuple[Tensor, Tensor]  # (low, high) or (scale, zero_point), [R] each


@dataclass(frozen=True)
class _Rule:
    n_bits: int
    symmetric: bool
    always_zero: bool
    official: bool
    p: float

    @property
    def steps(self) -> int:
        return 2**self.n_bits - 1

    @property
    def top(self) -> int:
        """Largest code of the signed grid."""
        return qrange(self.n_bits, symmetric=True)[1]


def choose_qparams(
    x: Tensor,
    n_bits: int,
    *,
    estimator: str,
    symmetric: bool = False,
    always_zero: bool = False,
    official: bool = False,
    p: float = 2.4,
    percentile: float = 99.99,
) -> Pair:
    """(scale, zero_point), [R] each, for the rows of x: [R, M], on the codes qrange(n_bits, symmetric).

    estimator: minmax | scaled_minmax | percentile | mse (80 candidates, L_p) | those of PTQ4DM (100 candidates), which
    have their own notion of symmetry, a range [-T, T] (one-sided if all of x is) on the unsigned codes
    qrange(n_bits, False).
    """
    rule = _Rule(n_bits, symmetric, always_zero, official, p)
    low, high = extremes(x)
    if estimator == "minmax":
        return _minmax(low, high, rule)
    if estimator == "scaled_minmax":
        return _minmax(low, high, rule, factor=(n_bits + 2) / 8)
    if estimator == "percentile":
        return _minmax(*percentile_range(x, percentile), rule)
    if estimator == "mse":
        return _mse(x, low, high, rule)
    if estimator in PTQ4DM:
        found = ptq4dm_range(x, n_bits, official=official, estimator=estimator)
        return ptq4dm_qparams(*found, n_bits, official=official)
    raise ValueError(f"estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")


def extremes(x: Tensor) -> Pair:
    """(low, high): the smallest and the largest value of each row of x: [R, M]."""
    low, high = torch.aminmax(x.detach(), dim=1)
    if not torch.isfinite(high - low).all():
        raise ValueError("cannot choose a quantization range: the values hold NaN or infinity")
    return low, high


def percentile_range(x: Tensor, percentile: float) -> Pair:
    """(low, high): the (100 - percentile)-th and the percentile-th percentile, nearest rank, per row of x: [R, M]."""
    last = x.shape[1] - 1
    rank = round(last * percentile / 100)
    return x.kthvalue(last - rank + 1, dim=1).values, x.kthvalue(rank + 1, dim=1).values


def blend(running: Pair, new: Pair, momentum: float) -> Pair:
    """momentum * running + (1 - momentum) * new, low and high.

    Q-Diffusion: `extremes` of each batch, momentum 0.95. PTQ4DM: `ptq4dm_range` of each batch, momentum 0.9.
    """
    return running[0] * momentum + new[0] * (1 - momentum), running[1] * momentum + new[1] * (1 - momentum)


def range_qparams(
    low: Tensor, high: Tensor, n_bits: int, *, symmetric: bool = False, always_zero: bool = False
) -> Pair:
    """(scale, zero_point) of running ranges, in low's precision. 0 need not lie in [low, high].

    scale = (high - low) / (2^b - 1); symmetric: max(|low|, |high|) / (2^(b-1) - 1); always_zero: high / (2^b - 1).
    zero_point = round(-low / scale), or 0 when symmetric or always_zero.
    """
    rule = _Rule(n_bits, symmetric, always_zero, official=False, p=2.4)
    scale = _scale(low, high, rule).clamp(min=SCALE_FLOOR)
    return scale, _zero_point(low, scale, rule)


def ptq4dm_range(
    x: Tensor, n_bits: int, *, side: int | None = None, official: bool = False, estimator: str = "ptq4dm"
) -> Pair:
    """(low, high) of PTQ4DM's search, R * i / 100 for i = 1..100 and R = max|x|, for each row of x: [R, M].

    estimator: by which error candidates are compared (its Table 4), a key of PTQ4DM.
    side: 1 for [0, T], -1 for [-T, 0], 0 for [-T, T]; None decides by `sidedness` of x.
    """
    low, high = extremes(x)
    side = sidedness(x) if side is None else side
    limit = _divide(torch.maximum(low.abs(), high), 100) * torch.arange(1, 101, device=x.device).unsqueeze(1)
    lows = torch.zeros_like(limit) if side > 0 else -limit
    highs = torch.zeros_like(limit) if side < 0 else limit
    scale, zero_point = ptq4dm_qparams(lows, highs, n_bits, official=official)
    candidates, p = Candidates(scale, zero_point, *qrange(n_bits, False)), PTQ4DM[estimator]
    index = best_aligned(x, candidates) if p is None else best_candidate(x, candidates, p)[0]
    return _pick(lows, index), _pick(highs, index)


def sidedness(x: Tensor) -> int:
    """1 if no value of x is negative, else -1 if none is positive, else 0."""
    return 1 if bool((x >= 0).all()) else -int(bool((x <= 0).all()))


def ptq4dm_qparams(low: Tensor, high: Tensor, n_bits: int, *, official: bool = False) -> Pair:
    """(scale, zero_point) of a PTQ4DM range: scale = (high - low) / (2^b - 1), zero_point in [0, 2^b - 1]."""
    scale = _divide(high - low, 2**n_bits - 1).clamp(min=SCALE_FLOOR)
    zero_point = (0 - torch.round(low / scale)).clamp(0, 2**n_bits - 1)
    two_sided = (low == -high) & (high > 0)
    return scale, zero_point if official else torch.where(two_sided, 2.0 ** (n_bits - 1), zero_point)


def _minmax(low: Tensor, high: Tensor, rule: _Rule, factor: float = 1.0) -> Pair:
    """In double, as the release's Python floats; then rounded to low's precision."""
    dtype, low, high = low.dtype, low.double(), high.double()
    bottom, top = low.clamp(max=0) * factor, high.clamp(min=0) * factor
    raw = rule.official and not rule.symmetric
    scale = (_divide(high - low, rule.steps) if raw else _scale(bottom, top, rule)).clamp(min=SCALE_FLOOR)
    return scale.to(dtype), _zero_point(bottom, scale, rule).to(dtype)


def _mse(x: Tensor, low: Tensor, high: Tensor, rule: _Rule) -> Pair:
    """Both ends shrink together to 100 %, 99 %, ..., 21 %."""
    factor = torch.tensor([1 - 0.01 * i for i in range(80)], dtype=torch.float64).to(x).unsqueeze(1)
    broken = rule.symmetric and rule.official
    grid = replace(rule, symmetric=rule.symmetric and not broken)
    scale = _scale(low * factor, high * factor, grid)
    zero_point = _zero_point(low * factor, scale, grid)
    codes = (0, rule.top - 1) if broken else qrange(rule.n_bits, rule.symmetric)
    index, found = best_candidate(x, Candidates(scale, zero_point, *codes), rule.p)
    scale, zero_point = _pick(scale, index), _pick(zero_point, index)
    usable = found & (scale > (0 if rule.official else SCALE_FLOOR))
    safe_scale, safe_zero_point = _minmax(low, high, replace(rule, official=False))
    return torch.where(usable, scale, safe_scale), torch.where(usable, zero_point, safe_zero_point)


def _scale(low: Tensor, high: Tensor, rule: _Rule) -> Tensor:
    if rule.symmetric:
        return _divide(torch.maximum(low.abs(), high.abs()), rule.top)
    return _divide(high if rule.always_zero else high - low, rule.steps)


def _zero_point(low: Tensor, scale: Tensor, rule: _Rule) -> Tensor:
    return torch.zeros_like(scale) if rule.symmetric or rule.always_zero else torch.round(-low / scale)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[index[r], r]: [K, R], [R] -> [R]."""
    return table.gather(0, index.unsqueeze(0)).squeeze(0)


def _divide(x: Tensor, number: float) -> Tensor:
    # By a tensor: CUDA turns a division by a Python number into a multiplication by its reciprocal.
    return x / torch.full_like(x, number)
