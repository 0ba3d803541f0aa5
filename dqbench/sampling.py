"""generate(): seeds -> samples. One torch.Generator per sample, on the CPU, so a sample depends on its seed alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dqbench.config import Sampler
from dqbench.models import anatomy, conditions
from dqbench.schedulers import make_scheduler

SEEDS_PER_RUN = 1_000_000
STEADY_ROWS = 16  # kernels round alike from this many rows on; fewer may take others (seen on x86 CPUs)


def sample_seed(seed: int, index: int) -> int:
    """The generator seed of sample `index` in a run with root seed `seed`."""
    return seed * SEEDS_PER_RUN + index


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def set_sampler(pipe: DiffusionPipeline, sampler: Sampler) -> DiffusionPipeline:
    """Give the pipeline the sampler's scheduler, on the noise schedule it came with."""
    pipe.scheduler = make_scheduler(dict(pipe.scheduler.config), sampler)
    return pipe


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, sampler: Sampler, seeds: Sequence[int], indices: Sequence[int] | None = None
) -> np.ndarray:
    """Samples [B, H, W, C] in [0, 1] for `seeds`; `indices` choose the conditions (default: the seeds themselves).

    The batch is filled up to padded_length() by repeating its last sample, so that a short last batch rounds as all do.
    """
    count, indices = len(seeds), seeds if indices is None else indices
    filler = padded_length(count, sampler) - count
    seeds, indices = [*seeds, *[seeds[-1]] * filler], [*indices, *[indices[-1]] * filler]
    available = {
        "generator": generators(seeds),
        "num_inference_steps": sampler.steps,
        "eta": sampler.eta,
        "guidance_scale": sampler.guidance,
        "output_type": "np",
        **conditions(anatomy(pipe), indices),
    }
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {key: value for key, value in available.items() if key in accepted}
    return np.asarray(pipe(**arguments).images)[:count]


def padded_length(count: int, sampler: Sampler) -> int:
    """Rows that `count` samples are computed in: a multiple of STEADY_ROWS, or of a smaller sampler.batch_size."""
    rows = min(STEADY_ROWS, sampler.batch_size)
    return -(-count // rows) * rows


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8 by rounding, [B, H, W, C]: the one conversion that scoring sees."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
