"""The releases' quantizers written the slow way: Python loops over channels and candidates, autograd left to itself.

Written from the papers and from what the releases do (Q-Diffusion, arXiv:2302.04304; PTQ4DM, arXiv:2211.15736), not
from dqbench.quant. Tests compare with it; the benchmark measures against it. Each choice of a range is for ONE tensor;
`per_row` applies it channel by channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1


def per_row(choose: Callable[..., tuple], x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Apply choose(row, ...) -> (scale, zero_point) to each row of x: [R, ...]; two tensors [R]."""
    scales, zero_points = [], []
    for channel in range(x.shape[0]):
        scale, zero_point = choose(x[channel], *args, **kwargs)
        scales.append(float(scale))
        zero_points.append(float(zero_point))
    return torch.tensor(scales), torch.tensor(zero_points)


def clip(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clip whose gradient is 1 on the bounds too, as torch.clamp's was until torch 2.14 made it 0 there."""
    clipped = x.detach().clamp(low, high)
    return torch.where(clipped == x.detach(), x, clipped)


def ste_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The composite that autograd differentiates by itself."""
    ratio = x / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    return (clip(rounded + zero_point, qmin, qmax) - zero_point) * scale


def scalar_code(value: float, scale: float, zero_point: float, qmin: int, qmax: int) -> int:
    """One code in Python numbers; the quotient is rounded to float32, as tensors would."""
    quotient = torch.tensor(value, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    return int(min(max(round(quotient.item()) + zero_point, qmin), qmax))


def codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """int32 codes of the rows of x: [R, M], element by element."""
    rows = [
        [scalar_code(value, s, z, qmin, qmax) for value in row]
        for row, s, z in zip(x.tolist(), scale.tolist(), zero_point.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def minmax_official(x: Tensor, n_bits: int, symmetric: bool = False, always_zero: bool = False, scaled: bool = False):
    """Q-Diffusion 'max': Python floats; the asymmetric scale sees the raw extremes."""
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    if scaled:
        low, high = low * (n_bits + 2) / 8, high * (n_bits + 2) / 8
    if symmetric:
        scale = max(abs(low), high) / (2 ** (n_bits - 1) - 1)
    else:
        scale = (x.max().item() - x.min().item()) / (2**n_bits - 1)
    scale = max(scale, 1e-8)
    return scale, 0 if symmetric or always_zero else round(-low / scale)


def minmax_sane(x: Tensor, n_bits: int, symmetric: bool = False, always_zero: bool = False, scaled: bool = False):
    """Min-max over a range that holds zero."""
    factor = (n_bits + 2) / 8 if scaled else 1
    low, high = min(x.min().item(), 0) * factor, max(x.max().item(), 0) * factor
    if symmetric:
        return max(max(-low, high) / (2 ** (n_bits - 1) - 1), 1e-8), 0
    scale = max((high - (0 if always_zero else low)) / (2**n_bits - 1), 1e-8)
    return scale, 0 if always_zero else round(-low / scale)


def lp_score(x: Tensor, q: Tensor) -> float:
    return (x - q).abs().pow(2.4).mean().item()


def mse_official(x: Tensor, n_bits: int, symmetric: bool = False, always_zero: bool = False):
    """Q-Diffusion 'mse': 80 shrinking ranges, L2.4, unsigned clip [0, N - 1] with N = 2^(b-1) - 1 when symmetric."""
    levels = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits
    best, chosen = 1e10, minmax_sane(x, n_bits, symmetric, always_zero)
    for i in range(80):
        high, low = x.max() * (1.0 - (i * 0.01)), x.min() * (1.0 - (i * 0.01))
        scale = (high if always_zero else high - low) / (2**n_bits - 1)
        if scale <= 0:
            continue
        zero_point = torch.zeros(()) if always_zero else torch.round(-low / scale)
        q = (torch.clamp(torch.round(x / scale) + zero_point, 0, levels - 1) - zero_point) * scale
        if (score := lp_score(x, q)) < best:
            best, chosen = score, (scale.item(), zero_point.item())
    return chosen


def mse_symmetric_sane(x: Tensor, n_bits: int):
    """The same search on a signed grid [-T, T]."""
    top = 2 ** (n_bits - 1) - 1
    best, chosen = math.inf, None
    for i in range(80):
        scale = torch.maximum((x.max() * (1.0 - i * 0.01)).abs(), (x.min() * (1.0 - i * 0.01)).abs()) / top
        score = lp_score(x, torch.clamp(torch.round(x / scale), -top - 1, top) * scale)
        if score < best:
            best, chosen = score, (scale.item(), 0.0)
    return chosen if chosen and chosen[0] >= 1e-8 else minmax_sane(x, n_bits, symmetric=True)


def ptq4dm(x: Tensor, n_bits: int, side: int, official: bool):
    """PTQ4DM's 1-D search, T = R / 100 * i; side 1: [0, T], -1: [-T, 0], 0: [-T, T], whose zero point is fragile."""
    limit = torch.maximum(x.min().abs(), x.max())
    best, chosen = math.inf, None
    for i in range(1, 101):
        threshold = limit / 100 * i
        low = torch.zeros(()) if side > 0 else -threshold
        high = torch.zeros(()) if side < 0 else threshold
        scale, zero_point = ptq4dm_qparams(low, high, n_bits, side, official)
        q = (torch.clamp(torch.round(x / scale) + zero_point, 0, 2**n_bits - 1) - zero_point) * scale
        if (score := lp_score(x, q)) < best:
            best, chosen = score, (scale.item(), zero_point.item())
    return chosen


def ptq4dm_qparams(low: Tensor, high: Tensor, n_bits: int, side: int, official: bool) -> tuple[Tensor, Tensor]:
    """float32: scale = (high - low) / (2^b - 1), zero_point = -round(low / scale) in [0, 2^b - 1]."""
    scale = torch.clamp((high - low) / (2**n_bits - 1), min=1e-8)
    if side == 0 and not official and high > 0:
        return scale, torch.tensor(2.0 ** (n_bits - 1))
    return scale, torch.clamp(0 - torch.round(low / scale), 0, 2**n_bits - 1)


def stretched_sigmoid(alpha: Tensor) -> Tensor:
    return clip(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def adaround_soft(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """AdaRound's soft weights, everything recomputed at each call."""
    soft = torch.floor(weight / scale) + stretched_sigmoid(alpha) + zero_point
    return (clip(soft, 0, 2**n_bits - 1) - zero_point) * scale


def rounding_penalty(alpha: Tensor, beta: float) -> Tensor:
    return (1 - (2 * stretched_sigmoid(alpha) - 1).abs().pow(beta)).sum()


def golden() -> dict[str, Tensor]:
    """Inputs, scales, zero points and codes of every estimator: what tests/data/quantizers.safetensors holds."""
    generator = torch.Generator().manual_seed(2023)
    x = torch.randn(8, 48, generator=generator) * torch.tensor([0.01, 0.05, 0.3, 1, 1, 4, 1, 1]).unsqueeze(1)
    x[3], x[4], x[5] = x[3].abs() + 0.2, -x[4].abs(), x[5].pow(3)  # one-sided rows, a heavy tail
    limits = torch.randn(400, generator=generator).abs()
    record = {"x": x, "limits": limits}
    for bits in (2, 4, 8):
        signed, unsigned = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1)
        choices = {
            "minmax": (per_row(minmax_official, x, bits), unsigned),
            "minmax_symmetric": (per_row(minmax_official, x, bits, symmetric=True), signed),
            "mse": (per_row(mse_official, x, bits), unsigned),
            "mse_symmetric": (per_row(mse_official, x, bits, symmetric=True), signed),
            "ptq4dm": (per_row(ptq4dm, x, bits, 0, True), unsigned),
            "ptq4dm_positive": (per_row(ptq4dm, x.abs(), bits, 1, True), unsigned),
        }
        for name, ((scale, zero_point), bounds) in choices.items():
            values = x.abs() if name == "ptq4dm_positive" else x
            record[f"{name}.{bits}.scale"], record[f"{name}.{bits}.zero_point"] = scale, zero_point
            record[f"{name}.{bits}.codes"] = codes(values, scale, zero_point, *bounds).short()
        zero_points = [ptq4dm_qparams(-limit, limit, bits, 0, True)[1] for limit in limits]
        record[f"limits.{bits}.zero_point"] = torch.stack(zero_points).short()
    return record


if __name__ == "__main__":  # python tests/reference/quantizers.py: record again
    from pathlib import Path

    from safetensors.torch import save_file

    save_file(golden(), Path(__file__).parents[1] / "data" / "quantizers.safetensors")
