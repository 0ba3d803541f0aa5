"""Two stages of quantization: clipped low-bit codes, then a sparse low-bit residual on what they miss most (RT+ZS).

Stage 1, per group: symmetric, scale = Q_p(|x|) / (2^(b1-1) - 1), or asymmetric, the range that holds p % of x, and 0,
in 2^b1 - 1 steps from a zero point. code = clip(round(x / scale)), X1 = scale code. Of the residual R = x - X1,
thresholds.py keeps a few elements; a codebook of b2 bits gives them values R^. x is represented by X1 + R^. Unclipped,
stage 1 leaves |R| <= scale / 2, flat: there one more bit for all beats any residual. It pays where stage 1 clips and R
holds the tail.

| codebook     | value of a surviving R                                                        | code           |
|--------------|-------------------------------------------------------------------------------|----------------|
| dead_zone    | sgn(R) (low + (k + 1/2) step), low = min|R|, step = (max|R| - low) / 2^(b2-1) | k, sign on top |
| uniform_sym  | c step, step = max|R| / (2^(b2-1) - 1); what rounds to 0 is dropped           | c + 2^(b2-1)   |
| uniform_asym | low + c step, low = min R, step = (max R - low) / (2^b2 - 1)                  | c              |

dead_zone with b2 = 1 is +-mean|R|. Parameters are stored in 16 bits where those hold them to 1 %, else in 32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqbench.config import OFF
from dqbench.errors import UserError, check_choice
from dqbench.quant.thresholds import SCOPES, per_scope, spread

CODEBOOKS = ("dead_zone", "uniform_sym", "uniform_asym")
INDEX_BITS = 8  # what rule rd charges for the place of an element, as blk8 does
RD_STARTS, RD_ROUNDS = (0.25, 0.5, 1, 2, 4, 8, 16), 3


@dataclass
class Codebook:
    """Of the residual: kind as above, bits b2 in 1..8, scope of its parameters."""

    kind: str
    bits: int
    scope: str

    def __post_init__(self) -> None:
        check_choice("codebook.kind", self.kind, CODEBOOKS)
        check_choice("codebook.scope", self.scope, SCOPES)
        least = 2 if self.kind == "uniform_sym" else 1
        if not least <= self.bits <= 8:
            raise UserError(f"codebook.bits={self.bits} is out of range for kind={self.kind}; allowed: {least} to 8")


@dataclass
class Zeros:
    """Effective zeros: codes of stage 1 that are set to 0 after the residual was taken.

    rule step: |X1| < value scale; percentile: |X1| below its value-th percentile over the tensor. value 0 sets none.
    """

    rule: str
    value: float

    def __post_init__(self) -> None:
        check_choice("zeros.rule", self.rule, ("step", "percentile"))
        if not 0 <= self.value <= 100:
            raise UserError(f"zeros.value={self.value} is out of range; allowed: 0 to 100")


def check_stage_1(key: str, n_bits: int | None) -> None:
    """Raise UserError for a width that stage 1 cannot have; None follows bits=."""
    if n_bits is not None and not (2 <= n_bits <= 8 or n_bits in OFF):
        raise UserError(f"{key}={n_bits} is not supported; allowed: null, 2 to 8, or 16 and 32 for full precision")


def check_percentiles(key: str, percentiles: Sequence[float]) -> None:
    """Raise UserError unless these are one or more shares of 100."""
    if not percentiles or not all(0 < share <= 100 for share in percentiles):
        raise UserError(f"{key}={list(percentiles)}; allowed: one or more, above 0, up to 100")


@dataclass(frozen=True)
class StageOne:
    """The grid of stage 1: percentile in (0, 100], the share of a group that is not clipped."""

    n_bits: int
    symmetric: bool
    percentile: float
    group_size: int


def stage_one(flat: Tensor, stage: StageOne) -> tuple[Tensor, Tensor, Tensor]:
    """(codes less the zero point, int16 [O, M]; scale as stored, zero_point uint8: [O, G]) of flat: [O, M] float32."""
    if not flat.numel():
        raise UserError(f"a weight of shape {list(flat.shape)} is empty: there is no range to choose")
    qmin, qmax = bounds(stage.n_bits, stage.symmetric)
    parts = flat.split(stage.group_size, dim=1)
    scale, zero_point = (
        torch.cat(values, dim=1)
        for values in zip(*(grid(part, stage.n_bits, stage.symmetric, stage.percentile) for part in parts), strict=True)
    )
    scale = compact(scale)
    wide, shift = (spread(values.float(), flat.shape[1], stage.group_size) for values in (scale, zero_point))
    codes = torch.clamp((flat / wide).round(), qmin - shift, qmax - shift).to(torch.int16)
    return codes, scale, (zero_point + 2 ** (stage.n_bits - 1) * stage.symmetric).to(torch.uint8)


def bounds(n_bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of stage 1; without -2^(b-1) where it is symmetric."""
    top = 2 ** (n_bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**n_bits - 1)


def grid(rows: Tensor, n_bits: int, symmetric: bool, percentile: float) -> tuple[Tensor, Tensor]:
    """(scale, zero_point), [R, 1] each, of rows [R, K]. A range of 0 takes the extremes, a row of zeros scale 1.

    Rows too short to have one element beyond the percentile are not clipped.
    """
    top = bounds(n_bits, symmetric)[1]
    percentile = percentile if rows.shape[1] * (100 - percentile) >= 100 else 100
    if symmetric:
        width = torch.quantile(rows.abs(), percentile / 100, dim=1, keepdim=True)
        low = torch.zeros_like(width)
    else:
        ends = rows.new_tensor([100 - percentile, 100 + percentile]) / 200
        low, high = torch.quantile(rows, ends, dim=1, keepdim=True)
        flat = high.clamp(min=0) == low.clamp(max=0)  # nothing but zeros within the percentile
        low = torch.where(flat, rows.amin(dim=1, keepdim=True), low).clamp(max=0)
        high = torch.where(flat, rows.amax(dim=1, keepdim=True), high).clamp(min=0)
        width = high - low
    width = torch.where(width > 0, width, rows.abs().amax(dim=1, keepdim=True))
    scale = torch.where(width > 0, width / top, 1.0)
    return scale, (-low / scale).round()


def compact(values: Tensor, together: bool = True) -> Tensor:
    """`values` in float16 where that holds all of them to 1 %, else in float32.

    Not `together`: each as 16 bits hold it where they do, in float32, so that none depends on another.
    """
    half = values.to(torch.float16)
    held = (half.float() - values).abs() <= 0.01 * values.abs()
    if not together:
        return torch.where(held, half.float(), values.float())
    return half if bool(held.all()) else values.float()


def effective_zeros(codes: Tensor, scale: Tensor, zeros: Zeros) -> Tensor:
    """Where stage 1 is set to 0, bool [O, M]."""
    if zeros.value == 0:
        return torch.zeros_like(codes, dtype=torch.bool)
    if zeros.rule == "step":
        return codes.abs() < zeros.value
    magnitude = (codes * scale).abs()
    return magnitude < magnitude.flatten().kthvalue(1 + round((codes.numel() - 1) * zeros.value / 100)).values


def worth_storing(residual: Tensor, x: Tensor, price: float, codebook: Codebook, group_size: int) -> Tensor:
    """Rule rd: where R^2 - (R - R^)^2 > price mean(x^2) (b2 + index bits), with the codebook of these very elements.

    From several first guesses, each followed for some rounds, the set of the smallest sum of error and price.
    """
    least = price * x.square().mean() * (codebook.bits + INDEX_BITS)
    best, lowest = torch.zeros_like(residual, dtype=torch.bool), 0.0
    for factor in RD_STARTS:
        support = residual.square() > factor * least
        for _ in range(RD_ROUNDS):
            low, step = (
                spread(v.float(), x.shape[1], group_size) for v in fit(residual, support, codebook, group_size)
            )
            decoded = decode(encode(residual, low, step, codebook), low, step, codebook)
            cost = least - residual.square() + (residual - decoded).square()
            if (total := cost[support].double().sum().item()) < lowest:
                best, lowest = support, total
            support = cost < 0
    return best


def fit(
    residual: Tensor, support: Tensor, codebook: Codebook, group_size: int, together: bool = True
) -> tuple[Tensor, Tensor]:
    """(low, step) of a codebook for the residuals [O, M] in support, within its scope, as stored: compact()."""

    keep = functools.partial(compact, together=together)

    def extreme(values: Tensor, sign: int) -> Tensor:  # over the support; 0 where that is empty
        filled = torch.where(support, sign * values, -torch.inf)
        found = sign * per_scope(filled, codebook.scope, group_size, lambda rows: rows.amax(dim=1))
        return torch.where(found.isfinite(), found, 0.0)

    magnitude = residual.abs()
    if codebook.kind == "uniform_sym":
        step = keep(extreme(magnitude, 1) / (half_of(codebook) - 1))
        return torch.zeros_like(step), step
    if codebook.kind == "uniform_asym":
        low = extreme(residual, -1)
        return keep(low), keep((extreme(residual, 1) - low) / (2**codebook.bits - 1))
    if codebook.bits == 1:
        total, count = (
            per_scope(values, codebook.scope, group_size, lambda rows: rows.sum(dim=1))
            for values in (magnitude * support, support.float())
        )
        low = keep(total / count.clamp(min=1))
        return low, torch.zeros_like(low)
    low = extreme(magnitude, -1)
    return keep(low), keep((extreme(magnitude, 1) - low) / half_of(codebook))


def half_of(codebook: Codebook) -> int:
    """2^(b2-1)."""
    return 2 ** (codebook.bits - 1)


def encode(residual: Tensor, low: Tensor, step: Tensor, codebook: Codebook) -> Tensor:
    """Codes, uint8, of residuals; low, step: float32, broadcastable to them. A step of 0 has one level."""
    half, step = half_of(codebook), step.clamp(min=torch.finfo(torch.float32).tiny)
    if codebook.kind == "uniform_sym":
        return ((residual / step).round().clamp(1 - half, half - 1) + half).to(torch.uint8)
    if codebook.kind == "uniform_asym":
        return ((residual - low) / step).round().clamp(0, 2 * half - 1).to(torch.uint8)
    level = ((residual.abs() - low) / step).floor().clamp(0, half - 1)
    return (level + half * (residual > 0)).to(torch.uint8)


def decode(codes: Tensor, low: Tensor, step: Tensor, codebook: Codebook) -> Tensor:
    """Values, float32, of codes; low, step as in encode()."""
    half, codes = half_of(codebook), codes.float()
    if codebook.kind == "uniform_sym":
        return (codes - half) * step
    if codebook.kind == "uniform_asym":
        return low + codes * step
    positive = codes >= half
    return (low + (codes - half * positive + 0.5) * step) * (2 * positive.float() - 1)
