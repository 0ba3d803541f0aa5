"""What each of the cells that run at once gets: GPUs of its own, or a share of the cores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqbench.errors import UserError


@dataclass
class Options:
    """The keys of hydra.launcher; conf/hydra/launcher/accelerate.yaml says what null stands for."""

    max_parallel: int | None
    gpus_per_cell: int | None
    processes_per_cell: int | None
    grace: float


@dataclass(frozen=True)
class Slot:
    """A place for one cell at a time. No devices: the CPU."""

    devices: tuple[str, ...]
    processes: int


def read_options(given: Mapping[str, Any]) -> Options:
    """The options, types and ranges checked."""
    from dqbench.launching.explain import explain

    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, "hydra.launcher")) from error
    for field in fields(Options):
        value, least = getattr(options, field.name), 0 if field.name == "grace" else 1
        if value is not None and not value >= least:
            raise UserError(f"hydra.launcher.{field.name}={value} is out of range; allowed: {least} or more")
    return options


def find_slots(options: Options, runtime: DictConfig) -> list[Slot]:
    """The slots that this machine has for a sweep under runtime.device and runtime.threads."""
    if runtime.device.startswith("cuda:"):
        line = f"runtime.device={runtime.device}: hydra/launcher=accelerate hands out the GPUs itself; "
        raise UserError(line + "allowed: auto, cpu, cuda; CUDA_VISIBLE_DEVICES names those it may use")
    if runtime.device == "cpu":
        return slots(options, [], cores(), runtime.threads)
    import torch

    gpus = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    return slots(options, gpus, cores(), runtime.threads)


def visible(setting: str | None, count: int) -> list[str]:
    """Names of the `count` GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them: of `setting`, its value."""
    return [name.strip() for name in setting.split(",")][:count] if setting else list(map(str, range(count)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots(options: Options, gpus: Sequence[str], n_cores: int, threads: int | None = None) -> list[Slot]:
    """Disjoint groups of GPUs; without GPUs as many places as there are cores for `threads` (None: 1) per process."""
    if not gpus:
        return cpu_slots(options, n_cores, threads or 1)
    size = options.gpus_per_cell or 1
    if size > len(gpus):
        raise UserError(f"hydra.launcher.gpus_per_cell={size}: {len(gpus)} to hand out ({', '.join(gpus)})")
    if options.processes_per_cell not in (None, size):
        line = f"hydra.launcher.processes_per_cell={options.processes_per_cell} is not gpus_per_cell={size}"
        raise UserError(f"{line}; allowed: null, which is one process per GPU")
    groups = [Slot(tuple(gpus[first : first + size]), size) for first in range(0, len(gpus) - size + 1, size)]
    return groups[: options.max_parallel]


def cpu_slots(options: Options, n_cores: int, threads: int) -> list[Slot]:
    """max_parallel of them, or what the cores serve."""
    if options.gpus_per_cell is not None:
        line = f"hydra.launcher.gpus_per_cell={options.gpus_per_cell}: there is no GPU to hand out"
        raise UserError(f"{line}; leave it at null to run on the CPU")
    processes = options.processes_per_cell or 1
    return [Slot((), processes)] * (options.max_parallel or max(1, n_cores // (processes * threads)))


def environment(slot: Slot, parallel: int, given: Mapping[str, str], n_cores: int) -> dict[str, str]:
    """`given` with the slot's GPUs and a share of the cores: all processes of `parallel` cells together have n_cores.

    A smaller OMP_NUM_THREADS of the user's stays.
    """
    share = max(1, n_cores // (parallel * slot.processes))
    own = given.get("OMP_NUM_THREADS", "")
    threads = str(min(share, int(own)) if own.isdigit() and int(own) else share)
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(slot.devices)} if slot.devices else {}
    return {**given, "OMP_NUM_THREADS": threads, **devices}
