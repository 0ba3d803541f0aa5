"""Learnable rounding of weights (Nagel et al. 2020, arXiv:2004.10568), as a parametrization made for speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dqbench.quant.functional import GAMMA, ZETA, adaround_grid, adaround_init
from dqbench.quant.quantizers import Grid


class AdaRound(nn.Module):
    """Parametrization of a weight by learnable rounding (Nagel et al. 2020, arXiv:2004.10568, Eq. 22-24).

    alpha: the weight's shape, in the grid's precision whatever the weight's. Where `beta` is set, the gradient of
    strength x sum of 1 - |2h - 1|^beta is added to alpha's; only the first `regularised` input channels take part, if
    given (the release's quirk in split layers).
    """

    def __init__(self, weight: Tensor, grid: Grid, regularised: int | None = None) -> None:
        super().__init__()
        floor, alpha = adaround_init(weight.contiguous(), grid.scale)
        self.base, self.step = adaround_grid(floor, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
        self.alpha = nn.Parameter(alpha)
        self.scale, self.regularised, self.dtype = grid.scale, regularised, weight.dtype
        self.beta: float | None = None
        self.strength = 0.0
        # Written anew by each forward, allocated once: fresh memory would cost more than the arithmetic.
        self.weight, self.slope, self.pull = (torch.empty_like(alpha) for _ in range(3))  # slope: dweight / dalpha
        size = 2**16 if alpha.device.type == "cpu" else alpha.numel()  # what stays in a core's cache
        tensors = (alpha, self.base, self.step, self.weight, self.slope, self.pull)
        self.pieces = list(zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True))
        self.scratch = alpha.new_empty(2, min(size, alpha.numel()))

    def forward(self, weight: Tensor) -> Tensor:
        """Soft weights; of the given weight only the precision counts."""
        return _SoftRounding.apply(self.alpha, self).to(weight.dtype)

    def soft(self) -> Tensor:
        """base + step * h(alpha); leaves in slope and pull what the gradient needs."""
        for alpha, base, step, weight, slope, pull in self.pieces:
            sigmoid, live = self.scratch[:, : len(alpha)]
            torch.sigmoid(alpha, out=sigmoid)
            torch.mul(sigmoid, ZETA - GAMMA, out=live).add_(GAMMA)
            h = torch.clamp(live, 0, 1, out=pull)
            live.eq_(h)
            torch.addcmul(base, h, step, out=weight)
            sigmoid.addcmul_(sigmoid, sigmoid, value=-1).mul_(live)  # dh / dalpha / (zeta - gamma)
            torch.mul(sigmoid, step, out=slope).mul_(ZETA - GAMMA)
            if self.beta is not None:
                regularise(h, sigmoid, live, self.beta, self.strength)
        if self.beta is not None and self.regularised is not None:
            self.pull[:, self.regularised :] = 0
        return self.weight.data

    def hard(self) -> Tensor:
        """Rounded weights in the original's precision, scale x whole numbers: up where alpha >= 0."""
        rounded = torch.where(self.alpha.detach() >= 0, self.base + self.step, self.base)
        return (rounded / self.scale).round_().mul_(self.scale).to(self.dtype)


def regularise(h: Tensor, sigmoid: Tensor, power: Tensor, beta: float, strength: float) -> None:
    """Replace h by d/dalpha of strength x (1 - |2h - 1|^beta), beta > 1. sigmoid: as `soft` leaves it. power: any."""
    h.mul_(2).sub_(1)
    torch.abs(h, out=power).log_().mul_(beta - 1).exp_().copysign_(h)  # exp(b log) takes a fifth of pow's time
    torch.mul(power, sigmoid, out=h).mul_(-2 * beta * strength * (ZETA - GAMMA))


class _SoftRounding(Function):
    """AdaRound.soft with a gradient: valid until the next forward, as a learning loop needs it."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, rounder: AdaRound) -> Tensor:
        ctx.rounder = rounder
        return rounder.soft()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rounder = ctx.rounder
        if rounder.beta is None:
            return grad * rounder.slope, None
        return torch.addcmul(rounder.pull, grad, rounder.slope), None
