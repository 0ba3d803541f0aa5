"""collect(): denoiser inputs along the full-precision trajectory -> CalibrationSet.

One sampling pass records every denoiser call (the trajectory, an artifact that all methods and policies share); a
policy then picks (chain, step) pairs from it. Steps are positions in the sampler's schedule: 0 is the noisiest.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.config import Calib, Sampler
from dqbench.errors import UserError
from dqbench.models import denoiser
from dqbench.sampling import generate, padded_length
from dqbench.shards import Shards, create_array, fill, save_array

Batch = dict[str, Tensor]


def named_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator of its own for every named purpose."""
    return torch.Generator().manual_seed(named_seed(name, seed))


def named_seed(name: str, seed: int) -> int:
    """63 bits of SHA-256("name/seed"): disjoint from the seeds of scored samples."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:8], "big") >> 1


@dataclass
class CalibrationSet:
    """N denoiser inputs: argument names -> arrays or memory maps [N, ...]; `step` [N] is their position."""

    inputs: dict[str, Any]
    step: np.ndarray
    seed: int = 0

    @classmethod
    def from_tensors(cls, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> CalibrationSet:
        """A set of a user's own recorded inputs: sample [N, ...], timestep [N], conditions [N, ...].

        Raises UserError where their lengths differ.
        """
        inputs = {"sample": sample, "timestep": timestep, **conditions}
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"calibration tensors differ in their number of rows: {lengths}; all must have N rows")
        order = {int(t): k for k, t in enumerate(sorted({int(t) for t in timestep}, reverse=True))}
        step = np.array([order[int(t)] for t in timestep])
        return cls({name: value.detach().cpu().numpy() for name, value in inputs.items()}, step)

    @classmethod
    def open(cls, folder: Path, seed: int) -> CalibrationSet:
        """The set stored in `folder` as one .npy per input, memory-mapped."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        step = np.asarray(arrays.pop("step"))
        return cls(arrays, step, seed)

    def save(self, folder: Path) -> None:
        """Write the set so that open() finds it."""
        for name, values in {**self.inputs, "step": self.step}.items():
            np.save(folder / f"{name}.npy", values)

    def __len__(self) -> int:
        return len(self.step)

    def rows(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """The denoiser's keyword arguments for chosen rows, on `device`."""
        return {name: torch.from_numpy(np.array(values[indices])).to(device) for name, values in self.inputs.items()}

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All rows in order, on `device`."""
        for first in range(0, len(self), batch_size):
            yield self.rows(np.arange(first, min(first + batch_size, len(self))), device)


@contextmanager
def recording(pipe: DiffusionPipeline) -> Iterator[list[Batch]]:
    """Record every denoiser call: a list of {argument name: [B, ...]} plus what it returned as "output", on the CPU."""
    calls: list[Batch] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        predicted = output[0] if isinstance(output, tuple) else output.sample
        calls.append({**call_inputs(module, args, kwargs), "output": predicted.detach().cpu().clone()})

    handle = denoiser(pipe).register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def call_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Batch:
    """The tensor arguments of one denoiser call by name, timestep broadcast to [B]."""
    arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    timestep = torch.as_tensor(arguments["timestep"]).reshape(-1)
    batch_size = len(arguments.get("sample", arguments.get("hidden_states")))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value is not module}
    tensors["timestep"] = timestep.expand(batch_size)
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def record_chains(pipe: DiffusionPipeline, sampler: Sampler, seeds: Sequence[int], first: int) -> dict[str, np.ndarray]:
    """One sampling pass of n chains -> {argument: [n, G, S, ...]}: S calls, G = 2 rows under guidance, else 1."""
    with recording(pipe) as calls:
        generate(pipe, sampler, seeds, range(first, first + len(seeds)))
    recorded = {name: torch.stack([call[name] for call in calls], dim=1) for name in calls[0]}
    rows = padded_length(len(seeds), sampler)
    halves = {name: values.unflatten(0, (-1, rows))[:, : len(seeds)] for name, values in recorded.items()}
    return {name: values.transpose(0, 1).numpy() for name, values in halves.items()}


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
    clean end, or with `official` from the noisy end, as the loop counter of the release does.
    fixed: one step, S // 2 unless given.
    """
    if calib.policy == "uniform":
        kept = np.arange(0, steps, steps // calib.steps)[: calib.steps]
        per_step = max(1, calib.samples // len(kept))
        return np.tile(np.arange(per_step) % calib.chains, len(kept)), np.repeat(kept, per_step)
    chain = np.arange(calib.samples) % calib.chains
    if calib.policy == "fixed":
        return chain, np.full(calib.samples, steps // 2 if calib.step is None else calib.step)
    draws = torch.normal(calib.mean, calib.std, (calib.samples,), generator=named_generator("ndtc", seed))
    t = (steps * draws).trunc().clamp(0, steps - 1).long().numpy()
    return chain, t if calib.official else steps - 1 - t


def select(source: Path, calib: Calib, seed: int, target: Path) -> None:
    """Write the policy's rows of the trajectory `source` to `target` as a CalibrationSet, guidance halves in turn."""
    for name in sorted({path.name.split(".")[0] for path in source.glob("*.npy")} - {"output"}):
        array = Shards(source, name)
        halves, steps, *shape = array.shape[1:]
        chain, step = pick(calib, steps, seed)
        count = len(chain)
        rows = create_array(target / f"{name}.npy", array.dtype, (halves * count, *shape))
        for i, (c, s) in enumerate(zip(chain, step, strict=True)):
            rows[i::count] = array[c][:, s]
        rows.flush()
    save_array(target / "step.npy", np.tile(step, halves))
    if calib.official and calib.policy == "normal":  # the release feeds the network the loop counter as its time input
        timestep = np.load(target / "timestep.npy", mmap_mode="r+")
        timestep[:] = np.tile(step, halves)
