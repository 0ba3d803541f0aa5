"""generate(): seeds -> samples. One torch.Generator per sample, on the CPU, so a sample depends on its seed alone."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dqbench.config import Sampler
from dqbench.errors import UserError
from dqbench.models import anatomy, conditions
from dqbench.schedulers import check_sampler, make_scheduler

SEEDS_PER_RUN = 1_000_000
STEADY_ROWS = 16  # kernels round alike from this many rows on; fewer may take others (seen on x86 CPUs)


def sample_seed(seed: int, index: int) -> int:
    """The generator seed of sample `index` in a run with root seed `seed`."""
    return seed * SEEDS_PER_RUN + index


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def set_sampler(pipe: DiffusionPipeline, sampler: Sampler) -> DiffusionPipeline:
    """Give the pipeline the sampler's scheduler, on the noise schedule it came with; it remembers the sampler."""
    pipe.scheduler = make_scheduler(dict(pipe.scheduler.config), sampler)
    pipe.sampler = sampler
    return pipe


def steps_of(pipe: DiffusionPipeline) -> Tensor:
    """The timesteps at which the pipeline under its sampler calls the denoiser, noisiest first; some may repeat.

    Raises UserError for a pipeline without a sampler: set_sampler() gives it one.
    """
    if (sampler := getattr(pipe, "sampler", None)) is None:
        raise UserError("the pipeline has no sampler; dqbench.sampling.set_sampler(pipe, sampler) gives it one")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(sampler.steps)
    return scheduler.timesteps.cpu()


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, sampler: Sampler, seeds: Sequence[int], indices: Sequence[int] | None = None
) -> np.ndarray:
    """Samples [B, H, W, C] in [0, 1] for `seeds`; `indices` choose the conditions (default: the seeds themselves).

    The batch is filled up to padded_length() by repeating its last sample, so that a short last batch rounds as all do.
    """
    check_sampler(pipe.scheduler, {"eta": sampler.eta, "guidance": sampler.guidance})
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
    with wrapped_step(pipe.scheduler, seeded(available["generator"])):
        images = np.asarray(pipe(**arguments).images)
    if len(images) != len(seeds):
        raise RuntimeError(f"{type(pipe).__name__} returned {len(images)} images for {len(seeds)} seeds")
    return images[:count]


@contextmanager
def wrapped_step(scheduler: Any, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside: `scheduler.step` is wrap(scheduler.step), with the signature it had (pipelines look at it)."""
    before, own = scheduler.step, "step" in vars(scheduler)
    scheduler.step = functools.wraps(before)(wrap(before))
    try:
        yield
    finally:
        if own:
            scheduler.step = before
        else:
            del scheduler.step


def seeded(generators: list[torch.Generator]) -> Callable[[Callable], Callable]:
    """A wrapper of a scheduler's step for pipelines, such as diffusers' DiTPipeline, that do not hand generators on.

    Where the rows are stacked halves, a sample's generator serves its row in each half in turn.
    """

    def wrap(step: Callable) -> Callable:
        def seeded_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if takes_generator and kwargs.get("generator") is None:
                kwargs["generator"] = generators * (len(sample) // len(generators))
            return step(model_output, timestep, sample, *args, **kwargs)

        takes_generator = "generator" in inspect.signature(step).parameters
        return seeded_step

    return wrap


def padded_length(count: int, sampler: Sampler) -> int:
    """Rows that `count` samples are computed in: a multiple of STEADY_ROWS, or of a smaller sampler.batch_size."""
    rows = min(STEADY_ROWS, sampler.batch_size)
    return -(-count // rows) * rows


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8 by rounding, [B, H, W, C]: the one conversion that scoring sees."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
