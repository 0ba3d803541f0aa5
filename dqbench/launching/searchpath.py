"""Hydra finds sweeps/ beside conf/, and in the folder a user works in."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SweepsSearchPath(SearchPathPlugin):
    """Adds the folder that holds sweeps/ (so that `+sweeps=NAME` is a config group), and a user's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders; earlier entries win."""
        from dqbench.config import data_root

        search_path.append("dqbench", f"file://{data_root()}")
        if (own := Path.cwd()) != data_root() and (own / "sweeps").is_dir():
            search_path.append("dqbench-user", f"file://{own}")


def register_search_path() -> None:
    """Register the plugin once per process."""
    Plugins.instance().register(SweepsSearchPath)
