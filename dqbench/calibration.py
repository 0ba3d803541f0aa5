"""collect(): denoiser inputs along the full-precision trajectory -> CalibrationSet.

One sampling pass records every denoiser call (the trajectory, an artifact that all methods and policies share); a
policy then picks (chain, step) pairs from it. Steps are positions in the sampler's schedule: 0 is the noisiest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.arguments import SAMPLES, Batch, call_inputs, flatten, nest
from dqbench.config import Calib, Sampler
from dqbench.errors import UserError
from dqbench.models import denoiser
from dqbench.sampling import generate, padded_length, wrapped_step
from dqbench.shards import Shards, arrays, create_array, fill, save_array


def named_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator of its own for every named purpose."""
    return torch.Generator().manual_seed(named_seed(name, seed))


def named_seed(name: str, seed: int) -> int:
    """63 bits of SHA-256("name/seed"): disjoint from the seeds of scored samples."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:8], "big") >> 1


@dataclass
class CalibrationSet:
    """N denoiser inputs: names by flatten() -> arrays or memory maps [N, ...]; `step` [N] is their position.

    batch_size: rows that pass the network at once while ranges are collected. dtype: of floating-point inputs as the
    network takes them; None: as they are stored.
    """

    inputs: dict[str, Any]
    step: np.ndarray
    seed: int = 0
    batch_size: int = 64
    dtype: torch.dtype | None = None

    @classmethod
    def from_tensors(
        cls, sample: Tensor, timestep: Tensor, *, argument: str = "sample", **conditions: Any
    ) -> CalibrationSet:
        """A set of a user's own recorded inputs: sample [N, ...], timestep [N], conditions [N, ...] or dicts of them.

        `argument`: the denoiser's name for its sample, "hidden_states" for transformers. Raises UserError where their
        lengths differ.
        """
        inputs = {argument: sample, "timestep": timestep, **flatten(conditions)}
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"calibration tensors differ in their number of rows: {lengths}; all must have N rows")
        order = {int(t): k for k, t in enumerate(sorted({int(t) for t in timestep}, reverse=True))}
        step = np.array([order[int(t)] for t in timestep])
        return cls({name: to_numpy(value) for name, value in inputs.items()}, step, dtype=sample.dtype)

    @classmethod
    def open(cls, folder: Path, seed: int, batch_size: int = 64, dtype: torch.dtype | None = None) -> CalibrationSet:
        """The set stored in `folder` as one .npy per input, memory-mapped."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        step = np.asarray(arrays.pop("step"))
        return cls(arrays, step, seed, batch_size, dtype)

    def save(self, folder: Path) -> None:
        """Write the set so that open() finds it."""
        for name, values in {**self.inputs, "step": self.step}.items():
            np.save(folder / f"{name}.npy", values)

    def __len__(self) -> int:
        return len(self.step)

    def rows(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """The denoiser's keyword arguments for chosen rows, on `device`."""
        chosen = {name: torch.from_numpy(np.array(values[indices])) for name, values in self.inputs.items()}
        return nest(
            {name: rows.to(device, self.dtype if rows.is_floating_point() else None) for name, rows in chosen.items()}
        )

    def batches(self, device: torch.device | str = "cpu", batch_size: int | None = None) -> Iterator[Batch]:
        """All rows in order, on `device`, `batch_size` (default: the set's own) at a time."""
        size = batch_size or self.batch_size
        for first in range(0, len(self), size):
            yield self.rows(np.arange(first, min(first + size, len(self))), device)

    def where(self, keep: np.ndarray) -> CalibrationSet:
        """The rows where `keep` [N] is true, in order; inputs that are memory-mapped are read only when asked for."""
        index = np.flatnonzero(keep)
        return replace(
            self, inputs={name: Chosen(values, index) for name, values in self.inputs.items()}, step=self.step[index]
        )


@dataclass(frozen=True)
class Chosen:
    """Some rows of an array, read when they are indexed."""

    array: Any
    index: np.ndarray

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.array[self.index[rows]]

    def __len__(self) -> int:
        return len(self.index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array[self.index], dtype)


def to_numpy(values: Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16, which numpy has not, as float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


@contextmanager
def recording(pipe: DiffusionPipeline) -> Iterator[list[dict[str, Tensor]]]:
    """Record every denoiser call: a list of {argument name: [B, ...]} plus what it returned as "output", on the CPU."""
    calls: list[dict[str, Tensor]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        predicted = output[0] if isinstance(output, tuple) else output.sample
        calls.append({**call_inputs(module, args, kwargs), "output": predicted.detach().cpu().clone()})

    handle = denoiser(pipe).register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def record_chains(pipe: DiffusionPipeline, sampler: Sampler, seeds: Sequence[int], first: int) -> dict[str, np.ndarray]:
    """One sampling pass of n chains -> {argument: [n, G, S, ...]}: S calls, G = 2 rows under guidance, else 1.

    Beside the denoiser's arguments: "output", what it returned, and "final" [n, ...], what the last step left.
    """
    latest: list[Tensor] = []

    def remembering(step: Callable) -> Callable:
        def remember(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            latest[:] = [(result[0] if isinstance(result, tuple) else result.prev_sample).detach()]
            return result

        return remember

    with recording(pipe) as calls, wrapped_step(pipe.scheduler, remembering):
        generate(pipe, sampler, seeds, range(first, first + len(seeds)))
    recorded = {name: torch.stack([call[name] for call in calls], dim=1) for name in calls[0]}
    rows = padded_length(len(seeds), sampler)
    halves = {name: values.unflatten(0, (-1, rows))[:, : len(seeds)] for name, values in recorded.items()}
    found = {name: to_numpy(values.transpose(0, 1)) for name, values in halves.items()}
    return {**found, "final": to_numpy(latest[0][: len(seeds)])}


def recorded_inputs(folder: Path) -> dict[str, Shards]:
    """The denoiser's arguments in a recorded trajectory, each [chains, G, S, ...]."""
    return {name: array for name, array in arrays(folder).items() if name not in ("output", "final")}


def calibration_seeds(rows: range, seed: int) -> list[int]:
    """Generator seeds of calibration chains."""
    return [named_seed(f"calibration/{i}", seed) for i in rows]


def record_trajectory(
    pipe: DiffusionPipeline, sampler: Sampler, chains: int, seeds: Callable[[range], list[int]], folder: Path
) -> None:
    """Fill `folder` with the full-precision trajectory of `chains` chains, resuming at the first missing one."""

    def produce(rows: range) -> dict[str, np.ndarray]:
        return record_chains(pipe, sampler, seeds(rows), rows.start)

    fill(folder, chains, sampler.batch_size, produce, "fp32 trajectory")


def pick(calib: Calib, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The (chain [N], step [N]) pairs of a policy on a trajectory of `steps` calls; step-major for uniform.

    uniform: steps range(0, S, S // calib.steps), as many chains of each as fit `samples` (Q-Diffusion's release).
    normal: t = trunc(S x Normal(mean, std)) clamped to [0, S-1], one draw per sample (PTQ4DM Eq. 15); t counts from the
    clean end, or with `official` from the noisy end, as the loop counter of the release does. With as many chains as
    samples every draw has a chain of its own, as in the release; with fewer, chains take turns step by step.
    fixed: one step, S // 2 unless given.
    """
    if calib.policy == "uniform":
        kept = kept_steps(calib, steps)
        per_step = calib.chains if calib.samples is None else max(1, calib.samples // len(kept))
        return np.tile(np.arange(per_step) % calib.chains, len(kept)), np.repeat(kept, per_step)
    if calib.policy == "fixed":
        return np.arange(calib.samples) % calib.chains, np.full(calib.samples, middle(calib, steps))
    draws = torch.normal(calib.mean, calib.std, (calib.samples,), generator=named_generator("ndtc", seed))
    t = (steps * draws).trunc().clamp(0, steps - 1).long().numpy()
    step = t if calib.official else steps - 1 - t
    if calib.chains >= calib.samples:
        return np.arange(calib.samples), step
    return turns(step) % calib.chains, step


def kept_steps(calib: Calib, steps: int) -> np.ndarray:
    """Positions of the uniform policy among `steps` of the sampler."""
    return np.arange(0, steps, steps // (calib.steps or steps))


def middle(calib: Calib, steps: int) -> int:
    """The one step of the fixed policy."""
    return steps // 2 if calib.step is None else calib.step


def turns(values: np.ndarray) -> np.ndarray:
    """For each element [N], how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(values)) - np.searchsorted(values[order], values[order])
    return ranks


def select(source: Path, calib: Calib, seed: int, target: Path) -> None:
    """Write the policy's rows of the trajectory `source` to `target` as a CalibrationSet, guidance halves in turn.

    The release of PTQ4DM takes the chain's sample after step k and feeds the network the counter k as its time input.
    """
    counted = calib.official and calib.policy == "normal"
    for name, array in recorded_inputs(source).items():
        halves, steps, *shape = array.shape[1:]
        chain, step = pick(calib, steps, seed)
        count = len(chain)
        rows = create_array(target / f"{name}.npy", array.dtype, (halves * count, *shape))
        for i, (c, s) in enumerate(zip(chain, step, strict=True)):
            after = counted and name in SAMPLES
            rows[i::count] = Shards(source, "final")[c] if after and s == steps - 1 else array[c][:, s + after]
        if counted and name == "timestep":
            rows[:] = np.tile(step, halves)
        rows.flush()
    save_array(target / "step.npy", np.tile(step, halves))
