"""Learnable rounding: where it starts and ends, and its hand-written gradient against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqbench.quant import functional as F
from dqbench.quant.adaround import AdaRound
from dqbench.quant.quantizers import Grid
from tests.reference import quantizers as ref

ROWS, M = 6, 50


def make(bits: int = 4, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Grid]:
    """A weight and its grid; some weights lie past the range when spread > 1."""
    weight = torch.randn(ROWS, M, generator=torch.Generator().manual_seed(3), dtype=dtype) * 0.05
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1) / spread
    return weight, Grid(scale, torch.round(-low / spread / scale), 0, 2**bits - 1)


def test_soft_rounding_starts_at_the_weight() -> None:
    weight, grid = make()
    floor = torch.floor(weight / grid.scale) + grid.zero_point
    interior = (floor >= 0) & (floor < 15)
    error = (AdaRound(weight, grid).soft() - weight).abs()[interior]
    assert interior.float().mean() > 0.9 and error.median() < 2e-8 and error.max() < 1e-7


def test_hard_rounding_takes_floor_or_the_next_code() -> None:
    weight, grid = make(bits=3, spread=1.5)
    rounder = AdaRound(weight, grid)
    codes = torch.round(rounder.hard() / grid.scale)
    assert torch.equal(codes * grid.scale, rounder.hard())  # one float per code
    floor = torch.floor(weight / grid.scale)
    assert torch.equal(codes + grid.zero_point, (floor + (rounder.alpha >= 0) + grid.zero_point).clamp(0, 7))
    nearest = F.quantize(weight, grid.scale, grid.zero_point, 0, 7)  # alpha >= 0: a rest of at least one half
    tie = ((weight / grid.scale - floor) - 0.5).abs() < 1e-5
    assert torch.equal((codes + grid.zero_point)[~tie], nearest[~tie].float())


@pytest.mark.parametrize("beta", [None, 20.0, 7.3, 2.0])
@pytest.mark.parametrize("spread", [1.0, 1.7])
def test_gradient_equals_the_composite(spread: float, beta: float | None) -> None:
    weight, grid = make(spread=spread, dtype=torch.float64)
    rounder = AdaRound(weight, grid)
    rounder.alpha.data.mul_(2)  # saturates some
    rounder.alpha.data[:, :2] = torch.tensor([0.0, 40.0])
    rounder.beta, rounder.strength = beta, 0.03
    pull = torch.randn(ROWS, M, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    alpha = rounder.alpha.detach().clone().requires_grad_()
    soft = rounder(weight)
    theirs = ref.adaround_soft(weight, alpha, grid.scale, grid.zero_point, 4)
    torch.testing.assert_close(soft, theirs)
    (soft * pull).sum().backward()
    penalty = 0.03 * ref.rounding_penalty(alpha, beta) if beta else 0
    ((theirs * pull).sum() + penalty).backward()
    torch.testing.assert_close(rounder.alpha.grad, alpha.grad, rtol=1e-5, atol=1e-8)
    assert 0.02 < (rounder.alpha.grad == 0).double().mean() < 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_learned_in_float32(dtype: torch.dtype) -> None:
    weight, grid = make()
    half, wide = AdaRound(weight.to(dtype), grid), AdaRound(weight.to(dtype).float(), grid)
    for rounder, given in ((half, weight.to(dtype)), (wide, weight)):
        (rounder(given).float() * weight).sum().backward()
    assert half.alpha.dtype == half.alpha.grad.dtype == torch.float32 and torch.equal(half.alpha, wide.alpha)
    torch.testing.assert_close(half.alpha.grad, wide.alpha.grad, rtol=0.01, atol=1e-6)  # half: the gradient it is given
    assert half(weight.to(dtype)).dtype == half.hard().dtype == dtype
    assert half(weight).dtype == torch.float32  # the layer's own precision counts
    assert torch.equal(half.hard(), wide.hard().to(dtype))


def test_only_the_first_half_is_regularised_if_asked_for() -> None:
    weight, grid = make()
    rounder = AdaRound(weight, grid, regularised=20)
    rounder.beta, rounder.strength = 2.0, 1.0
    (rounder(weight) * 0).sum().backward()
    assert rounder.alpha.grad[:, :20].abs().sum() > 0 and rounder.alpha.grad[:, 20:].abs().sum() == 0
