"""What a row shows beside its metrics: curves over the sampler's steps and a picture of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dqbench import processes
from dqbench.calibration import CalibrationSet, recorded_inputs
from dqbench.metrics.base import Metric, mean_interval
from dqbench.models import denoiser
from dqbench.progress import track
from dqbench.shards import Shards

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 64
MANY = 10  # lines that a cycle of distinct colors tells apart; more are shades of one scale
Curves = Mapping[str, Any]  # made by curves()


@torch.no_grad()
def noise_errors(pipe: DiffusionPipeline, trajectory: Path) -> np.ndarray:
    """||eps_q - eps|| / ||eps|| at the inputs of a full-precision trajectory: [chains, G, steps]."""
    arrays, wanted = recorded_inputs(trajectory), Shards(trajectory, "output")
    chains, halves, steps = wanted.shape[:3]
    errors = np.zeros((chains, halves, steps))
    spans = [(first, step) for first in range(0, chains, BATCH) for step in range(steps)]
    own = processes.split(spans)
    for first, step in track(own, "noise error", len(own)):
        part = range(first, min(first + BATCH, chains))
        inputs = {name: np.concatenate([array[c][:, step] for c in part]) for name, array in arrays.items()}
        rows = CalibrationSet(inputs, np.full(len(part) * halves, step), dtype=denoiser(pipe).dtype)
        predicted = denoiser(pipe)(**rows.rows(np.arange(len(rows)), pipe.device))[0].cpu()
        exact = torch.from_numpy(np.concatenate([wanted[c][:, step] for c in part]))
        relative = (predicted.float() - exact).flatten(1).norm(dim=1) / exact.float().flatten(1).norm(dim=1)
        errors[part.start : part.stop, :, step] = relative.reshape(len(part), halves).numpy()
    return processes.add_up(torch.from_numpy(errors)).numpy()


def mean_over_chains(errors: np.ndarray) -> Metric:
    """The noise error averaged over steps, its interval over chains."""
    values = errors.mean(axis=(1, 2))
    mean, half = mean_interval(values)
    protocol = (
        "||eps_q - eps|| / ||eps|| at the same x_t of full-precision sampling; mean over steps, t interval over chains"
    )
    return Metric(mean, mean - half, mean + half, len(values), "denoiser output", protocol, higher_is_better=False)


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    bands: Mapping[str, Sequence[float]] | None = None,
    *,
    x_label: str = "timestep",
    log: bool = False,
) -> dict[str, Any]:
    """A group of curves over the same x [T], as a row keeps it and save_curves draws it.

    lines: values [T] by name, None leaves a gap; bands: half-widths [T] of the 95 % intervals of some of the lines.
    """
    for name, values in [*lines.items(), *(bands or {}).items()]:
        if len(values) != len(x):
            raise ValueError(f"curve {name} has {len(values)} values at {len(x)} places")
    return {
        "x": [_brief(place) for place in x],
        "x_label": x_label,
        "log": log,
        "lines": {name: [_brief(value) for value in values] for name, values in lines.items()},
        "bands": {name: [_brief(value) for value in values] for name, values in (bands or {}).items()},
    }


def _brief(value: float | None) -> float | int | None:
    """Six significant digits; whole numbers stay whole."""
    if value is None:
        return None
    return int(value) if float(value).is_integer() else float(f"{float(value):.6g}")


def noise_error_curves(errors: np.ndarray, timesteps: Sequence[int]) -> dict[str, Any]:
    """The noise error step by step, noisiest first, of errors [chains, G, steps]: mean and interval over chains."""
    points = [mean_interval(column) for column in errors.mean(axis=1).T]
    means, halves = zip(*points, strict=True)
    return curves([int(t) for t in timesteps], {"noise error": means}, {"noise error": halves})


def save_curves(groups: Mapping[str, Curves], path: Path) -> None:
    """A PNG with one panel per group of curves, in the order of sampling: descending timesteps run to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False).flatten()
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        _draw(axes, name, group)
    _replace(path, lambda partial: figure.savefig(partial, dpi=120))


def _draw(axes: Axes, name: str, group: Curves) -> None:
    x, lines = group["x"], group["lines"]
    few = len(lines) <= MANY
    for color, (label, values) in zip(_colors(len(lines)), lines.items(), strict=True):
        y = np.array(values, dtype=float)
        axes.plot(x, y, color=color, label=label, linewidth=1.2, marker="." if few else None, markersize=4)
        if label in group["bands"]:
            half = np.array(group["bands"][label], dtype=float)
            axes.fill_between(x, y - half, y + half, color=color, alpha=0.2, linewidth=0)
    if group["log"]:
        axes.set_yscale("log")
    if len(x) > 1 and x[0] > x[-1]:
        axes.invert_xaxis()
    axes.set(title=name, xlabel=group["x_label"])
    axes.grid(alpha=0.3)
    if list(lines) != [name]:
        place = {} if few else {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": math.ceil(len(lines) / 24)}
        axes.legend(fontsize="small" if few else "xx-small", **place)


def _colors(count: int) -> Sequence[Any]:
    """A color per line: distinct ones for a few, a scale in their order for many."""
    from matplotlib import colormaps

    if count <= MANY:
        return colormaps["tab10"].colors[:count]
    return colormaps["viridis"](np.linspace(0, 0.92, count))


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
    size = (picture.shape[1] * zoom, picture.shape[0] * zoom)
    _replace(path, Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the picture beside `path`, then rename it: whole or not at all."""
    partial = path.with_suffix(f".tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
