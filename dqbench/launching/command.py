"""The cells of a sweep as command lines, for launchers that give each a process or a process group of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dqbench.identity import run_id
from dqbench.launching.cells import run_folder
from dqbench.tracking import sweep_name

LOG = "process.log"  # in the run's folder: all that its processes print; dqbench.log beside it has the tracebacks

ACCELERATE = {  # every choice that would otherwise come from the user's own accelerate configuration
    "num_machines": "1",
    "gpu_ids": "all",
    "mixed_precision": "no",
    "dynamo_backend": "no",
    "main_process_port": "0",  # a free one
}


@dataclass(frozen=True)
class Job:
    """A cell that is to run. label: what sets it apart from the sweep's other cells."""

    name: str
    cfg: DictConfig
    overrides: list[str]
    label: str

    @property
    def log(self) -> Path:
        """Where its processes print."""
        return run_folder(self.cfg) / LOG


def cell_command(overrides: Sequence[str], processes: int = 1) -> list[str]:
    """The command that runs one cell, by `accelerate launch` where several processes share it.

    --multi_gpu means "several processes on this machine"; where torch sees no GPU they talk through gloo.
    """
    cell = ["-m", "dqbench", *overrides, "hydra.mode=RUN"]
    if processes == 1:
        return [sys.executable, *cell]
    options = [part for name, value in ACCELERATE.items() for part in (f"--{name}", value)]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return [*start, *options, *cell]


def config_flags(argv: Sequence[str]) -> list[str]:
    """The flags of a sweep's command line that say where its configs are, for its cells."""
    given, _ = get_args_parser().parse_known_args(argv)
    folder = given.config_dir and os.path.abspath(given.config_dir)
    flags = {"--config-dir": folder, "--config-name": given.config_name, "--config-path": given.config_path}
    return [f"{flag}={value}" for flag, value in flags.items() if value]


def cell_overrides(sweep: DictConfig, overrides: Sequence[str], cfg: DictConfig) -> list[str]:
    """What cell_command() takes for a cell: flags and Hydra's overrides of the sweep, the cell's own, W&B's group.

    sweep: the config of the sweep itself; cfg: the cell's.
    """
    of_hydra = [line for line in sweep.hydra.overrides.hydra if not line.startswith("hydra.mode=")]
    HydraConfig.instance().set_config(sweep)
    grouped = "group" not in cfg.tracking or cfg.tracking.group is not None
    group = [] if grouped else [f"tracking.group={sweep_name(cfg)}"]
    return [*config_flags(sys.argv[1:]), *of_hydra, *overrides, *group]


def jobs_of(sweep: DictConfig, overrides: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[Job]:
    """A job per run id; axes that a method ignores name a cell twice."""
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    jobs: dict[str, Job] = {}
    for given, cfg in zip(overrides, configs, strict=True):
        label = " ".join(line for line in given if line not in common) or "the default"
        name = run_id(cfg)
        jobs.setdefault(name, Job(name, cfg, cell_overrides(sweep, given, cfg), label))
    return list(jobs.values())


def returned(overrides: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[JobReturn]:
    """What Hydra is told: every cell is COMPLETED, or it would stop the sweep; rows decide about the exit status."""
    return [
        JobReturn(overrides=list(given), cfg=cfg, status=JobStatus.COMPLETED, working_dir=os.getcwd())
        for given, cfg in zip(overrides, configs, strict=True)
    ]
