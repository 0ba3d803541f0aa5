"""What a row shows beside its metrics: the error of the predicted noise step by step, and a picture of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dqbench.calibration import recorded_inputs
from dqbench.metrics.base import Metric, mean_interval
from dqbench.models import denoiser
from dqbench.progress import track
from dqbench.shards import Shards

BATCH = 64


@torch.no_grad()
def noise_errors(pipe: DiffusionPipeline, trajectory: Path) -> np.ndarray:
    """||eps_q - eps|| / ||eps|| at the inputs of a full-precision trajectory: [chains, G, steps]."""
    arrays, wanted = recorded_inputs(trajectory), Shards(trajectory, "output")
    chains, halves, steps = wanted.shape[:3]
    errors = np.empty((chains, halves, steps))
    spans = [(first, step) for first in range(0, chains, BATCH) for step in range(steps)]
    for first, step in track(spans, "noise error", len(spans)):
        part = range(first, min(first + BATCH, chains))
        rows = {
            name: torch.from_numpy(np.concatenate([array[c][:, step] for c in part])) for name, array in arrays.items()
        }
        predicted = denoiser(pipe)(**{name: values.to(pipe.device) for name, values in rows.items()})[0].cpu()
        exact = torch.from_numpy(np.concatenate([wanted[c][:, step] for c in part]))
        relative = (predicted - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        errors[part.start : part.stop, :, step] = relative.reshape(len(part), halves).numpy()
    return errors


def mean_over_chains(errors: np.ndarray) -> Metric:
    """The noise error averaged over steps, its interval over chains."""
    values = errors.mean(axis=(1, 2))
    mean, half = mean_interval(values)
    protocol = (
        "||eps_q - eps|| / ||eps|| at the same x_t of full-precision sampling; mean over steps, t interval over chains"
    )
    return Metric(mean, mean - half, mean + half, len(values), "denoiser output", protocol, higher_is_better=False)


def curve(errors: np.ndarray, timesteps: Sequence[int]) -> dict[str, Any]:
    """The noise error step by step, noisiest first: timestep, mean over chains, standard error."""
    flat = errors.reshape(-1, errors.shape[2])
    return {
        "timestep": [int(t) for t in timesteps],
        "noise_error": [round(float(value), 6) for value in flat.mean(axis=0)],
        "noise_error_se": [round(float(value), 6) for value in flat.std(axis=0) / len(flat) ** 0.5],
    }


def save_grid(full: np.ndarray, quantized: np.ndarray | None, path: Path, columns: int = 12) -> None:
    """A PNG of the first samples, uint8 [N, H, W, C]: full precision above, the same seeds quantized below."""
    from PIL import Image

    rows = [full[:columns]] if quantized is None else [full[:columns], quantized[:columns]]
    strips = [
        np.concatenate([np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=128) for image in row], axis=1)
        for row in rows
    ]
    picture = np.concatenate(strips, axis=0)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    zoom = max(1, 96 // full.shape[1])
    partial = path.with_suffix(".tmp.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = (picture.shape[1] * zoom, picture.shape[0] * zoom)
        Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
