"""Fake quantization and AdaRound: grid properties, codes, and gradients against what autograd derives by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqbench.quant import functional as F
from tests.reference import quantizers as ref

ROWS, M = 6, 50
GRIDS = [(0.1, 0.0, -8, 7), (0.037, 9.0, 0, 15), (0.2, -40.0, 0, 15), (0.01, 300.0, 0, 255)]


def ramp(scale: float, zero_point: float, qmin: int, qmax: int) -> Tensor:
    """Values around the whole range, past both ends, with every tie between two codes and every code among them."""
    ties = (torch.arange(2 * (qmin - 4), 2 * (qmax + 4) + 1, dtype=torch.float64) / 2 - zero_point) * scale
    return torch.cat([ties, ties + 0.3 * scale]).float()


def row_grid(bits: int = 4) -> tuple[Tensor, Tensor, Tensor, int, int]:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(ROWS, M, generator=generator)
    scale = torch.rand(ROWS, 1, generator=generator) * 0.2 + 0.05
    zero_point = torch.randint(-3, 2**bits + 3, (ROWS, 1), generator=generator).float()
    return x, scale, zero_point, 0, 2**bits - 1


@pytest.mark.parametrize(
    "bits, symmetric, expected",
    [(8, False, (0, 255)), (8, True, (-128, 127)), (2, True, (-2, 1)), (16, False, (0, 65535))],
)
def test_qrange(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert F.qrange(bits, symmetric) == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_equal_scalar_arithmetic(grid: tuple) -> None:
    scale, zero_point, qmin, qmax = grid
    x, s, z = ramp(*grid), torch.tensor(scale), torch.tensor(zero_point)
    codes = F.quantize(x, s, z, qmin, qmax)
    assert codes.dtype == torch.int32
    assert codes.tolist() == [ref.scalar_code(v, scale, zero_point, qmin, qmax) for v in x.tolist()]
    assert torch.equal(F.fake_quantize(x, s, z, qmin, qmax), F.dequantize(codes, s, z))


def test_rounding_divides_and_goes_to_even() -> None:
    one = torch.ones(())
    assert F.quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), one, 0 * one, -8, 7).tolist() == [0, 2, 2, 0, -2]
    x, scale = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 25, torch.tensor(0.098)
    codes = F.quantize(x, scale, torch.zeros(()), 0, 255)
    assert torch.equal(codes, torch.round(x / scale).to(torch.int32))
    assert not torch.equal(codes, torch.round(x * (1 / scale)).to(torch.int32))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    scale=st.floats(0.001953125, 2, width=32),
    zero_point=st.integers(-20, 40),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_grid_properties(values: list[float], scale: float, zero_point: int, bits: int, symmetric: bool) -> None:
    qmin, qmax = F.qrange(bits, symmetric)
    x, s, z = torch.tensor(values).sort().values, torch.tensor(scale), torch.tensor(float(zero_point))
    y = F.fake_quantize(x, s, z, qmin, qmax)
    assert torch.equal(F.fake_quantize(y, s, z, qmin, qmax), y)
    assert (y.diff() >= 0).all()
    inside = (x >= (qmin - z) * s) & (x <= (qmax - z) * s)
    assert ((y - x).abs()[inside] <= s * (0.5 + 1e-5) + 1e-5 * x.abs()[inside]).all()
    assert ((qmin - z) * s <= y).all() and (y <= (qmax - z) * s).all()


def backward(function, x: Tensor, scale: Tensor, *grid) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = function(x, scale, *grid)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), (x, scale))


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_equal_the_straight_through_composite_on_ties_and_bounds(grid: tuple) -> None:
    scale, zero_point, qmin, qmax = grid
    x = ramp(*grid).double()
    arguments = (x, torch.tensor(scale).double(), torch.tensor(zero_point).double(), qmin, qmax)
    ours, theirs = backward(F.fake_quantize, *arguments), backward(ref.ste_fake_quantize, *arguments)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1), (1, M), (ROWS, M)])
def test_scale_gradient_has_the_shape_of_scale(shape: tuple[int, ...]) -> None:
    x, scale, zero_point, qmin, qmax = row_grid()
    scale = scale.mean().expand(shape).clone() if shape != (ROWS, 1) else scale
    zero_point = torch.full(shape, 6.0) if shape != (ROWS, 1) else zero_point
    ours = backward(F.fake_quantize, x, scale, zero_point, qmin, qmax)
    theirs = backward(ref.ste_fake_quantize, x, scale, zero_point, qmin, qmax)
    assert ours[2].shape == shape
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_gradients_by_hand() -> None:
    x = torch.tensor(
        [0.24, 0.71, -5.0, 5.0], requires_grad=True
    )  # codes 1, 4, clipped to 0, clipped to 7; zero_point 2
    scale = torch.tensor(0.2, requires_grad=True)
    y = F.fake_quantize(x, scale, torch.tensor(2.0), 0, 7)
    for element, (slope_x, slope_scale) in enumerate([(1, 1 - 1.2), (1, 4 - 3.55), (0, -2), (0, 5)]):
        grad_x, grad_scale = torch.autograd.grad(y[element], (x, scale), retain_graph=True)
        assert grad_x[element] == slope_x
        assert grad_scale.item() == pytest.approx(slope_scale, abs=1e-6)


def test_gradcheck_where_the_map_is_smooth() -> None:
    """Where x stays clipped, y is linear in the scale: the finite difference is the gradient."""
    x = torch.tensor([5.0, -5.0], dtype=torch.float64)
    scale = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: F.fake_quantize(x, s, zero_point, 0, 7), (scale,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale, zero_point = torch.tensor(0.013, requires_grad=True), torch.tensor(120.0)
    wide = F.fake_quantize(x.float(), scale, zero_point, 0, 255)
    narrow = F.fake_quantize(x.requires_grad_(), scale, zero_point, 0, 255)
    assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))
    narrow.sum().backward()
    assert x.grad.dtype == dtype and scale.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, transposed, scale_shape",
    [((8, 2**15 + 5), False, ()), ((2**9, 2**9), True, ()), ((3, 2**16), False, (1,)), ((3, 2**16), False, (1, 1))],
)
def test_gradients_of_large_tensors_equal_those_of_their_rows(shape, transposed, scale_shape, dtype) -> None:
    """Large tensors are worked on in pieces, whatever their layout; a row is small enough to be taken whole."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = x.t() if transposed else x
    grid = torch.full(scale_shape, 0.02), torch.full(scale_shape, 100.0), 0, 255
    weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view(x.shape)

    def gradients(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = x.detach().requires_grad_(), grid[0].clone().requires_grad_()
        return torch.autograd.grad(F.fake_quantize(x, scale, *grid[1:]), (x, scale), weights)

    whole = gradients(x, weights)
    rows = [gradients(*row) for row in zip(x.split(1), weights.split(1), strict=True)]
    assert whole[0].dtype == dtype and torch.equal(whole[0], torch.cat([row[0] for row in rows]))
    torch.testing.assert_close(whole[1], sum(row[1] for row in rows), rtol=1e-4, atol=0)
    scale = grid[0].clone().requires_grad_()  # where the input needs no gradient
    assert torch.autograd.grad(F.fake_quantize(x, scale, *grid[1:]), scale, weights)[0] == whole[1]


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, scale, zero_point, qmin, qmax = row_grid()
    assert not F.fake_quantize(x, scale, zero_point, qmin, qmax).requires_grad
    y = F.fake_quantize(x.requires_grad_(), scale, zero_point.requires_grad_(), qmin, qmax)
    y.sum().backward()
    assert scale.grad is None and zero_point.grad is None
    with torch.no_grad():
        assert torch.equal(F.fake_quantize(x, scale, zero_point, qmin, qmax), y)
