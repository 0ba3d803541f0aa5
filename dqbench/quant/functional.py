"""Uniform affine fake quantization and AdaRound: tensor -> tensor. How a scale is chosen is in ranges.py.

x is represented by scale * (code - zero_point), code = clip(round(x / scale) + zero_point, qmin, qmax).
Rounding is half to even. Zero points are whole numbers held in floating tensors and may lie outside [qmin, qmax].
Gradients are those of the straight-through estimator as Q-Diffusion's release uses it (arXiv:2302.04304), not LSQ's; a
code on a bound counts as inside (torch.clamp's own gradient there was 1 until torch 2.14 made it 0).
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

GAMMA, ZETA = -0.1, 1.1  # the stretched sigmoid's ends, AdaRound (Nagel et al. 2020, arXiv:2004.10568) Eq. 23
PIECE = 2**16  # elements: a gradient's temporaries then stay in cache; of larger tensors, fresh memory costs the most


def qrange(n_bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of n_bits: [0, 2^b - 1], or [-2^(b-1), 2^(b-1) - 1] when symmetric."""
    half = 2 ** (n_bits - 1)
    return (-half, half - 1) if symmetric else (0, 2 * half - 1)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of x, int32 in [qmin, qmax]. x: any shape; scale, zero_point: broadcastable to x."""
    return (_ratio(x, scale).round_() + zero_point).clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """scale * (codes - zero_point), in scale's dtype."""
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Uniform affine fake quantization. x: any shape; scale, zero_point: broadcastable to x. Returns x's shape, dtype.

    Half-precision x is computed in scale's float32: a 16-bit x / scale would be rounded twice.
    Gradients: inside the range dy/dx = 1, dy/dscale = round(x / scale) - x / scale; clipped, 0 and bound - zero_point.
    """
    # clip(r + z, qmin, qmax) - z == clip(r, qmin - z, qmax - z) for whole numbers: two passes over memory less.
    lo, hi = qmin - zero_point, qmax - zero_point
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _FakeQuantize.apply(x, scale, lo, hi)
    return _clip_(_ratio(x, scale).round_(), lo, hi).mul_(scale).to(x.dtype)


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    # A true division. torch.fake_quantize_* multiplies by 1 / scale, so its codes are equal only where scale is a power
    # of two, and on CPU it takes 2.5 times as long as these in-place passes: not used.
    return x.to(torch.promote_types(x.dtype, scale.dtype)) / scale


def _clip_(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    # Two one-sided clips: clamp(min=Tensor, max=Tensor) is not vectorised on CPU when the bounds are broadcast.
    return x.clamp_min_(lo).clamp_max_(hi)


class _FakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        ratio = _ratio(x, scale)
        ctx.save_for_backward(ratio, lo, hi)
        ctx.scale_shape, ctx.scale_dtype = scale.shape, scale.dtype
        return _clip_(ratio.round(), lo, hi).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, lo, hi = ctx.saved_tensors
        if ctx.scale_shape.numel() > 1 or lo.numel() > 1 or not _is_large(ratio, grad):
            grad_x, slope = _gradients(ratio, grad, lo, hi)
            return grad_x.to(grad.dtype), slope.sum_to_size(ctx.scale_shape).to(ctx.scale_dtype), None, None
        lo, hi = lo.reshape(()), hi.reshape(())
        grad_x = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        outputs = grad_x.view(-1).split(PIECE) if grad_x is not None else repeat(None)
        pieces = zip(ratio.view(-1).split(PIECE), grad.view(-1).split(PIECE), outputs, strict=False)
        slopes = [_gradients(r, g, lo, hi, out)[1].sum() for r, g, out in pieces]
        return grad_x, torch.stack(slopes).sum().reshape(ctx.scale_shape).to(ctx.scale_dtype), None, None


def _is_large(*tensors: Tensor) -> bool:
    """Whether a pass over them in pieces pays: on a CPU, where temporaries then stay in a core's cache."""
    return (
        tensors[0].device.type == "cpu" and tensors[0].numel() > 2 * PIECE and all(x.is_contiguous() for x in tensors)
    )


def _gradients(ratio: Tensor, grad: Tensor, lo: Tensor, hi: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """grad * dy/dx, into `out` if given, and grad * dy/dscale, both of ratio's shape."""
    code = ratio.round()
    clipped = code.clamp_min(lo).clamp_max_(hi)
    inside = code.eq_(clipped)  # 1.0 or 0.0: floating masks are vectorised on CPU, boolean ones are not
    grad_x = torch.mul(grad, inside, out=out)
    slope = clipped.addcmul_(ratio, inside, value=-1)  # dy/dscale: clip(round(r)) - r inside, the bound outside
    return grad_x, slope.mul_(grad)


def adaround_init(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """floor(weight / scale) and alpha0 with h(alpha0) = weight / scale - floor, so that soft rounding starts at weight.

    alpha0 = -ln((zeta - gamma) / (rest - gamma) - 1), rest in [0, 1). Shapes: weight's.
    """
    ratio = weight / scale
    floor = torch.floor(ratio)
    return floor, -torch.log((ZETA - GAMMA) / (ratio - floor - GAMMA) - 1)


def adaround_grid(floor: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """(base, step) with soft weights = base + step * h(alpha): what does not change while alpha is learned.

    step is 0 where the clip leaves floor and floor + 1 the same code; such elements get no gradient.
    """
    low = floor.clamp(qmin - zero_point, qmax - zero_point)
    high = (floor + 1).clamp(qmin - zero_point, qmax - zero_point)
    return low * scale, (high - low) * scale
