"""hydra/launcher=slurm. Hydra imports every module of this namespace package at each start: nothing heavy here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Each cell is a task of a Slurm job array; conf/hydra/launcher/slurm.yaml lists the options."""

    def __init__(self, **options: Any) -> None:
        self.given = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Refuse bad options, and a machine without Slurm, before anything is written."""
        from dqbench.launching.slurm_options import read_options, require_slurm

        self.sweep, self.options = config, read_options(self.given)
        require_slurm()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit the cells that are not finished, and wait for them."""
        from dqbench.launching.slurm import launch

        return launch(self.sweep, job_overrides, initial_job_idx, self.options)
