"""A Hydra callback: before anything runs or is created, all cells are known, checked, looked up among the finished."""

from __future__ import annotations

import copy
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dqbench import processes
from dqbench.commands import exit_status
from dqbench.config import build, compose, expand
from dqbench.errors import UserError, one_line
from dqbench.identity import run_id
from dqbench.launching.checks import check
from dqbench.launching.preflight import meet
from dqbench.launching.table import axes

cells: list[DictConfig] = []  # of this invocation: one, or those of a sweep


class Cells(Callback):
    """Fills `cells`; ends the program where one of them is bad (status 2) or all are finished (status 0)."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A single run."""
        with ending():
            admit([config])

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A sweep: hydra.sweeper.params of a preset, then the command line."""
        HydraConfig.instance().set_config(config)  # the sweep's name is asked for also where no cell is left to run
        with ending():
            if processes.launched() > 1:
                given = "accelerate launch gives several processes to one cell"
                raise UserError(f"{given}; a sweep starts without it: python -m dqbench -m hydra/launcher=accelerate")
            check_preset(config)
            configs = [compose(overrides) for overrides in expand([*axes(config), *config.hydra.overrides.task])]
            admit(configs, elsewhere=config.hydra.launcher._target_.endswith(".SlurmLauncher"))


def check_preset(config: DictConfig) -> None:
    """Raise UserError for what a preset says wrongly of the published tables that it stands for."""
    if name := config.hydra.runtime.choices.get("sweeps"):
        from dqbench.rendering.presets import paper_preset

        paper_preset(name)


def admit(configs: list[DictConfig], elsewhere: bool = False) -> None:
    """Raise UserError for a bad cell, SystemExit(0) where none is left to run. Imports torch only for those.

    elsewhere: the cells run on other machines, which have GPUs where this one may have none.
    """
    for cfg in configs:
        check(cfg)
    cells[:] = configs
    meet(configs[0].runtime.device)
    pending = processes.agreed(lambda: [cfg for cfg in configs if cfg.runtime.force or not is_finished(cfg)])
    if not pending:
        raise SystemExit(0)
    from dqbench.run import Cell

    for cfg in pending:
        Cell(without_gpu(cfg) if elsewhere else cfg)
        build(cfg.tracking)


def without_gpu(cfg: DictConfig) -> DictConfig:
    """The cell as it can be checked on a machine without GPUs."""
    if not re.fullmatch(r"cuda(:\d+)?", cfg.runtime.device):
        return cfg
    copied = copy.deepcopy(cfg)
    copied.runtime.device = "auto"
    return copied


def run_folder(cfg: DictConfig) -> Path:
    """Where a cell leaves its row."""
    return Path(cfg.paths.results) / "runs" / run_id(cfg)


def is_finished(cfg: DictConfig, anew: bool = False) -> bool:
    """Whether a cell's row is there. anew: another machine may have written it just now, on a network file system."""
    from dqbench.results import finished
    from dqbench.stages import refresh

    folder = run_folder(cfg)
    if anew:
        refresh(folder.parent)
        refresh(folder)
    return finished(folder) is not None


@contextmanager
def ending() -> Iterator[None]:
    """End the program on any error: Hydra would make a warning of what a callback raises, and go on."""
    try:
        with exit_status():
            yield
    except Exception as error:
        if os.environ.get("DQBENCH_DEBUG"):
            traceback.print_exc()
        processes.tell(f"{type(error).__name__}: {one_line(error)}")
        raise SystemExit(1) from error
