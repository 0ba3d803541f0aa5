"""One cell of a sweep as a command line, for launchers that give it a process or a process group of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dqbench.tracking import sweep_name

ACCELERATE = {  # every choice that would otherwise come from the user's own accelerate configuration
    "num_machines": "1",
    "gpu_ids": "all",
    "mixed_precision": "no",
    "dynamo_backend": "no",
    "main_process_port": "0",  # a free one
}


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


def cell_overrides(sweep: DictConfig, overrides: Sequence[str], cfg: DictConfig) -> list[str]:
    """What cell_command() takes for a cell: Hydra's overrides of the sweep, the cell's own, the sweep as W&B's group.

    sweep: the config of the sweep itself; cfg: the cell's.
    """
    of_hydra = [line for line in sweep.hydra.overrides.hydra if not line.startswith("hydra.mode=")]
    HydraConfig.instance().set_config(sweep)
    grouped = "group" not in cfg.tracking or cfg.tracking.group is not None
    return [*of_hydra, *overrides, *([] if grouped else [f"tracking.group={sweep_name(cfg)}"])]
