"""Paired metrics: quantized samples against the full-precision samples of the same seeds, image by image."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dqbench.errors import UserError
from dqbench.metrics.base import Metric, mean_interval

BATCH = 256  # images read at a time
GAUSSIAN_FROM = 16  # px: smaller images have too few full 11x11 windows


def paired(images: np.ndarray, reference_images: np.ndarray) -> dict[str, Metric]:
    """PSNR (dB), SSIM and cosine similarity of two uint8 arrays [N, H, W, C]; mean and t interval over images."""
    if images.shape != reference_images.shape:
        raise UserError(f"paired metrics need equal shapes, got {images.shape} and {reference_images.shape}")
    if len(images) < 2:
        raise UserError("paired metrics need at least 2 samples for an interval: raise sampler.num_samples")
    batches = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
    values = [_compare(_unit(images[batch]), _unit(reference_images[batch])) for batch in batches]
    protocols = _protocols(images.shape[1:])
    return {name: _mean(torch.cat([v[name] for v in values]), protocols[name]) for name in protocols}


def _unit(images: np.ndarray) -> Tensor:
    """[N, H, W, C] uint8 -> [N, C, H, W] float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 255


def _compare(images: Tensor, reference: Tensor) -> dict[str, Tensor]:
    return {
        "psnr": _psnr(images, reference),
        "ssim": structural_similarity_index_measure(
            images, reference, reduction="none", data_range=1.0, **_ssim_window(images.shape[-2:])
        ).reshape(-1),
        "cosine": F.cosine_similarity(2 * images.flatten(1) - 1, 2 * reference.flatten(1) - 1),
    }


def _psnr(images: Tensor, reference: Tensor) -> Tensor:
    """[N] dB; identical images would be infinite and count as the smallest difference that uint8 can hold."""
    psnr = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return psnr.clamp(max=_psnr_cap(images[0].numel()))


def _psnr_cap(num_values: int) -> float:
    """PSNR of two images that differ by one gray level in one value: 10 log10(255^2 * values per image)."""
    return 10 * math.log10(255**2 * num_values)


def _ssim_window(size: tuple[int, int]) -> dict[str, object]:
    """Wang et al. 2004: 11x11 Gaussian, sigma 1.5. Below 16 px a uniform window of at most 7x7 (scikit-image's)."""
    if min(size) >= GAUSSIAN_FROM:
        return {"gaussian_kernel": True, "kernel_size": 11, "sigma": 1.5}
    return {"gaussian_kernel": False, "kernel_size": min(7, (min(size) - 1) // 2 * 2 + 1)}


def _protocols(shape: tuple[int, int, int]) -> dict[str, str]:
    window = _ssim_window(shape[:2])
    kind = "Gaussian (sigma 1.5)" if window["gaussian_kernel"] else "uniform"
    return {
        "psnr": f"dB per image, identical images count as {_psnr_cap(math.prod(shape)):.1f} dB",
        "ssim": f"{kind} {window['kernel_size']}x{window['kernel_size']} window (torchmetrics)",
        "cosine": "of pixels in [-1, 1]",
    }


def _mean(values: Tensor, protocol: str) -> Metric:
    mean, half = mean_interval(values.double().numpy())
    protocol = f"{protocol}; mean and t interval over images"
    return Metric(mean, mean - half, mean + half, len(values), "pixels", protocol, higher_is_better=True)
