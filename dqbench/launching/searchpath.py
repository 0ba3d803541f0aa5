"""Hydra finds sweeps/ beside conf/, and in the folder a user works in."""

from __future__ import annotations

import textwrap
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

HELP_WIDTH = 110  # characters of a line that lists choices


class SweepsSource(FileConfigSource):
    """A folder of which Hydra sees sweeps/ alone: --help asks for all groups, and takes minutes where .venv is one."""

    @staticmethod
    def scheme() -> str:
        """What search paths of this kind begin with."""
        return "sweeps"

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The names in a folder; in the outermost one, `sweeps`."""
        found = super().list(config_path, results_filter)
        return found if config_path else [name for name in found if name == "sweeps"]


class SweepsSearchPath(SearchPathPlugin):
    """Adds the folder that holds sweeps/ (so that `+sweeps=NAME` is a config group), and a user's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders; earlier entries win."""
        from dqbench.config import data_root

        search_path.append("dqbench", f"sweeps://{data_root()}")
        if (own := Path.cwd()) != data_root() and (own / "sweeps").is_dir():
            search_path.append("dqbench-user", f"sweeps://{own}")


def register_search_path() -> None:
    """Register both once per process."""
    SourcesRegistry.instance().register(SweepsSource)
    Plugins.instance().register(SweepsSearchPath)


def presets(group: str = "sweeps") -> list[str]:
    """The names that `+sweeps=NAME` takes, or a group below it."""
    from dqbench.config import data_root

    return sorted({path.stem for root in (data_root(), Path.cwd()) for path in (root / group).glob("*.yaml")})


def choices() -> str:
    """Every config group with its options, the default starred, for --help."""
    from dqbench.config import data_root

    conf = data_root() / "conf"
    chosen: dict[str, str] = {"hydra/launcher": "basic"}
    for entry in OmegaConf.load(conf / "config.yaml").defaults:
        chosen |= dict(entry) if OmegaConf.is_dict(entry) else {}
    folders = [folder for folder in sorted(conf.rglob("*")) if folder.is_dir()]
    groups = {
        folder.relative_to(conf).as_posix(): sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in folders
        if conf / "hydra" not in folder.parents
    }
    groups |= {"+sweeps": presets(), "+sweeps/cluster": presets("sweeps/cluster")}
    groups["hydra/launcher"] = sorted(["basic", *(path.stem for path in (conf / "hydra" / "launcher").glob("*.yaml"))])
    lines = []
    for group, names in groups.items():
        starred = ", ".join(name + "*" * (chosen.get(group) == name) for name in names)
        lines += textwrap.wrap(f"{group:<16}{starred}", HELP_WIDTH, subsequent_indent=" " * 16) if names else []
    return "\n  ".join(lines)
