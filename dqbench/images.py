"""Image models: samples are pixels, and quantization shows in the noise that is predicted along the trajectory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import DiffusionPipeline

from dqbench import processes
from dqbench.calibration import calibration_seeds, record_trajectory, select
from dqbench.diagnostics import mean_over_chains, noise_error_curves, noise_errors, save_grid
from dqbench.metrics.base import Metric
from dqbench.metrics.guards import check_finite, check_samples
from dqbench.metrics.paired import paired
from dqbench.sampling import generate, sample_seed, to_uint8
from dqbench.shards import Shards, save_array
from dqbench.sources import replace_source

if TYPE_CHECKING:
    from dqbench.record import Stages
    from dqbench.run import Cell, Quantized
    from dqbench.stages import Artifact

PROBE_CHAINS = 64  # scored seeds along whose full-precision trajectory the error of the predicted noise is measured


def check(cell: Cell) -> None:
    """Nothing: conditions are optional, and looked at when the pipeline is."""


def sample(cell: Cell, pipe: DiffusionPipeline, rows: range) -> dict[str, np.ndarray]:
    """uint8 images [B, H, W, C]; sample i depends on its seed alone."""
    images = generate(pipe, cell.sampler, [sample_seed(cell.seed, i) for i in rows], rows)
    check_finite(images, rows.start)
    return {"sample": to_uint8(images)}


def trajectory(cell: Cell, chains: int, purpose: str) -> Artifact:
    """Inputs and outputs of full-precision sampling: calibration chains, or the first scored seeds (probe)."""
    seeds = {
        "calibration": partial(calibration_seeds, seed=cell.seed),
        "probe": lambda rows: [sample_seed(cell.seed, i) for i in rows],
    }[purpose]
    return cell.store.get(
        "trajectory",
        {**cell.origin, "chains": chains, "purpose": purpose},
        lambda folder: record_trajectory(cell.pipe, cell.sampler, chains, seeds, folder),
        together=True,
    )


def calibrate(cell: Cell) -> Artifact:
    """The calibration set that the policy picks from the shared trajectory."""
    source = trajectory(cell, cell.calib.chains, "calibration")

    def produce(folder: Path) -> None:
        select(source.folder, cell.calib, cell.seed, folder)
        if cell.calib.source != "trajectory":
            replace_source(cell.pipe, cell.calib, cell.seed, folder)

    depends = {"trajectory": source.key, "calib": cell.picked, "data": cell.data_hash, "seed": cell.seed}
    artifact = cell.store.get("calibration", depends, produce)
    return replace(artifact, seconds=source.seconds + artifact.seconds, resumed=source.resumed or artifact.resumed)


def network_error(cell: Cell, quantized: Quantized) -> Artifact:
    """||eps_q - eps|| / ||eps|| along full-precision sampling of the first scored seeds.

    Of the network's own output: neither guided nor corrected by the sampler.
    """
    probe = trajectory(cell, min(PROBE_CHAINS, cell.sampler.num_samples), "probe")

    def produce(folder: Path) -> None:
        errors = noise_errors(cell.load(quantized), probe.folder)
        if processes.is_main():
            save_array(folder / "errors.npy", errors)
            save_array(folder / "timestep.npy", Shards(probe.folder, "timestep")[0][0])

    depends = {"probe": probe.key, "quantized": quantized.denoiser.key}
    return cell.store.get("noise_error", depends, produce, together=True)


def compare(samples: np.ndarray, reference: np.ndarray, error: Artifact) -> dict[str, Metric]:
    """PSNR and its like of the same seeds, and the error of the predicted noise."""
    return {**paired(samples, reference), "noise_error": mean_over_chains(np.load(error.folder / "errors.npy"))}


def error_curves(error: Artifact) -> dict[str, Any]:
    """The error of the predicted noise over the sampler's steps."""
    errors, timestep = (np.load(error.folder / f"{name}.npy") for name in ("errors", "timestep"))
    return {"noise error": noise_error_curves(errors, timestep)}


def picture(cell: Cell, stages: Stages, folder: Path) -> None:
    """The first samples as a PNG, full precision above, quantized below."""
    full, own = (Shards(part.folder, "sample").read() for part in (stages.reference, stages.samples))
    save_grid(full, own if stages.error else None, folder / "samples.png")


__all__ = ["calibrate", "check", "check_samples", "compare", "error_curves", "network_error", "picture", "sample"]
