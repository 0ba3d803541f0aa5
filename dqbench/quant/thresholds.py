"""Which residuals survive: the rules of a threshold tau, |R| > tau, over a tensor, a channel or a group.

| rule     | value is                                                                                               |
|----------|--------------------------------------------------------------------------------------------------------|
| quantile | rho, the share that survives: tau is the (1 - rho)-quantile of |R|, nearest rank; of a short scope at   |
|          | least one element survives, so that 0.01 keeps 1 in 16 of groups of 16; rho = 0 keeps none             |
| l2, l1   | k: tau = k rms(R), tau = k mean|R|                                                                     |
| step     | kappa: tau = kappa scale / 2; kappa = 1 keeps exactly what stage 1 clipped                             |
| energy   | eta: the fewest elements that hold this share of sum R^2                                               |
| abs      | tau itself                                                                                             |
| rd       | lambda: relative squared error that a stored bit per weight must save (residual.py, needs the codebook) |
| calib    | replaced by the rho that the search of methods/rtzs.py finds for each layer, in `search`'s grid        |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqbench.errors import UserError, check_choice

SCOPES = ("tensor", "channel", "group")
SHARES = ("quantile", "energy", "calib")  # rules whose value is a share
TIE = 1 + 2**-10  # a rounding error at half a step is no clipped element


@dataclass
class Threshold:
    """A rule, its value, and the scope it is applied in; for other rules than these, see above."""

    rule: str
    value: float
    scope: str

    def __post_init__(self) -> None:
        check_choice("threshold.rule", self.rule, RULES)
        check_choice("threshold.scope", self.scope, SCOPES)
        limit = 1 if self.rule in SHARES else float("inf")
        if not 0 <= self.value <= limit:
            raise UserError(f"threshold.value={self.value} is out of range for rule={self.rule}; allowed: 0 to {limit}")


def per_scope(values: Tensor, scope: str, group_size: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """reduce: [R, K] -> [R], applied to values [O, M] within a scope: [1, 1], [O, 1] or [O, ceil(M / group_size)]."""
    if scope == "tensor":
        return reduce(values.reshape(1, -1)).reshape(1, 1)
    size = values.shape[1] if scope == "channel" else group_size
    return torch.stack([reduce(part) for part in values.split(size, dim=1)], dim=1)


def spread(parameters: Tensor, columns: int, group_size: int) -> Tensor:
    """What per_scope() returned, broadcastable to [O, columns]."""
    if parameters.shape[1] == 1:
        return parameters
    return parameters.repeat_interleave(group_size, dim=1)[:, :columns]


def survivors(residual: Tensor, scale: Tensor, threshold: Threshold, group_size: int) -> Tensor:
    """Where |R| > tau, bool [O, M]. residual: [O, M]; scale: that of stage 1, broadcastable to it. Not for rule rd."""
    magnitude = residual.abs()
    if threshold.rule == "step":
        return magnitude > threshold.value * scale / 2 * TIE
    tau = per_scope(magnitude, threshold.scope, group_size, lambda rows: tau_of(rows, threshold))
    return magnitude > spread(tau, residual.shape[1], group_size)


def expected_share(threshold: Threshold, count: int) -> float:
    """The share of a scope of `count` elements that survives; exact for quantile (and calib, were `value` its choice).

    The other rules: of an unclipped residual, uniform in +-scale / 2; 0 for abs and rd.
    """
    value, rule = threshold.value, threshold.rule
    if rule in ("quantile", "calib"):
        return survivors_of(count, value) / count
    known = {"energy": 1 - (1 - min(value, 1)) ** (1 / 3)}
    known |= {"l2": 1 - value / 3**0.5, "l1": 1 - value / 2, "step": 1 - value}
    return max(0.0, known.get(rule, 0.0))


def tau_of(magnitude: Tensor, threshold: Threshold) -> Tensor:
    """tau [R] of rows |R|: [R, K], for the rules that look at nothing else."""
    return RULES[threshold.rule](magnitude, threshold.value)


def survivors_of(count: int, rho: float) -> int:
    """How many of `count` elements rule=quantile keeps: rho of them, rounded, and at least one unless rho is 0."""
    return max(round(rho * count), int(rho > 0))


def _quantile(magnitude: Tensor, rho: float) -> Tensor:
    rank = magnitude.shape[1] - survivors_of(magnitude.shape[1], rho)
    return magnitude.kthvalue(rank, dim=1).values if rank else magnitude.new_zeros(len(magnitude))


def _l2(magnitude: Tensor, k: float) -> Tensor:
    return k * magnitude.square().mean(dim=1).sqrt()


def _l1(magnitude: Tensor, k: float) -> Tensor:
    return k * magnitude.mean(dim=1)


def _energy(magnitude: Tensor, eta: float) -> Tensor:
    """The largest element that is left out: those before it hold the share already."""
    ordered = magnitude.sort(dim=1, descending=True).values
    held = ordered.double().square().cumsum(dim=1)
    kept = (held < eta * held[:, -1:]).sum(dim=1) + (eta > 0)
    padded = torch.cat([ordered, ordered.new_zeros(len(ordered), 1)], dim=1)
    return padded.gather(1, kept.clamp(max=ordered.shape[1]).unsqueeze(1)).squeeze(1)


def _abs(magnitude: Tensor, tau: float) -> Tensor:
    return magnitude.new_full((len(magnitude),), tau)


def _elsewhere(magnitude: Tensor, value: float) -> Tensor:
    raise UserError("threshold.rule=step, rd and calib need more than the residual: only for weights, or static steps")


RULES = {
    "quantile": _quantile,
    "l2": _l2,
    "l1": _l1,
    "energy": _energy,
    "abs": _abs,
    "step": _elsewhere,
    "rd": _elsewhere,
    "calib": _quantile,
}
