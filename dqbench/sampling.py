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
    """Samples [B, H, W, C] in [0, 1] for `seeds`; `indices` choose the conditions (default: the seeds themselves)."""
    available = {
        "generator": generators(seeds),
        "num_inference_steps": sampler.steps,
        "eta": sampler.eta,
        "guidance_scale": sampler.guidance,
        "output_type": "np",
        **conditions(anatomy(pipe), indices if indices is not None else seeds),
    }
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {key: value for key, value in available.items() if key in accepted}
    return np.asarray(pipe(**arguments).images)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8 by rounding, [B, H, W, C]: the one conversion that scoring sees."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
