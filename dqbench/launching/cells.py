"""A Hydra callback that remembers, in the launching process, which cells a sweep has, and refuses bad ones at once."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

sweep: list[DictConfig] = []  # the resolved-on-access configs of the running multirun's cells


class Cells(Callback):
    """Fills `sweep` before the first cell starts."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compose and check every cell; raises UserError before anything runs."""
        from dqbench.config import check, compose, expand

        overrides = [*params(config.hydra.sweeper.params), *config.hydra.overrides.task]
        sweep[:] = [compose(cell) for cell in expand(overrides)]
        for cell in sweep:
            check(cell)


def params(node: DictConfig | None) -> list[str]:
    """hydra.sweeper.params of a preset as overrides."""
    return [f"{key}={value}" for key, value in (node or {}).items()]
