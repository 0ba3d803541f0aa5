"""hydra/launcher=accelerate. Hydra imports every module of this namespace package at each start: nothing heavy here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class AccelerateLauncher(Launcher):
    """Runs each cell of a sweep as a process group of its own; dqbench.launching.side_by_side does the work."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raise UserError for options that do not go with this machine, before anything runs."""
        from dqbench.launching.pool import find_slots, read_options

        self.config = config
        self.wanted = read_options(self.options)
        self.slots = find_slots(self.wanted, config.runtime)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the cells; those of the sweep that are finished already are not started."""
        from dqbench.launching.side_by_side import launch

        return launch(self.config, job_overrides, initial_job_idx, self.slots, self.wanted.grace)
