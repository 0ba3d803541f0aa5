"""Presets of sweeps/ that regenerate a paper's tables: read, and checked against what is published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dqbench import published
from dqbench.config import data_root
from dqbench.errors import UserError, check_choice, one_line
from dqbench.launching.searchpath import presets
from dqbench.launching.table import SCALES, Table, read_table
from dqbench.published import Paper, PublishedRow

DELTA = "delta_"  # published as the change of a metric


@dataclass(frozen=True)
class Preset:
    """sweeps/NAME.yaml and the published tables that it names."""

    name: str
    axes: Table
    paper: Paper

    @property
    def tables(self) -> list[published.Table]:
        """Those of columns that the preset has a setting for, in its order of names, then in the paper's."""
        named = [table for name in self.axes.tables for table in self.paper.tables if table.table == name]
        return [table for table in named if any(self.setting(scale, table) for scale in SCALES)]

    def setting(self, scale: str, table: published.Table) -> str | None:
        """The setting that stands for a published column at a scale; None: nothing does."""
        return self.axes.setting(scale, str(table.model), str(table.dataset), table.steps)


def paper_presets() -> Iterator[Preset]:
    """Those whose `table.paper` names published numbers, by name."""
    yield from filter(None, map(paper_preset, presets()))


def paper_preset(name: str) -> Preset | None:
    """A preset with the numbers that it names, checked; None where it names none."""
    path = locate(name)
    axes = read_axes(path)
    if axes is None or not axes.paper:
        return None
    check_words(f"{path}: table.paper", [axes.paper], published.papers())
    return checked(Preset(name, axes, published.load(axes.paper)), path)


def locate(name: str) -> Path:
    """The file of a preset: that of the package, else the user's own."""
    paths = [root / "sweeps" / f"{name}.yaml" for root in (data_root(), Path.cwd())]
    if not (found := [path for path in paths if path.is_file()]):
        raise UserError(f"preset {name} is in none of {', '.join(str(path.parent) for path in paths)}")
    return found[0]


def read_axes(path: Path) -> Table | None:
    """The `table:` node of a preset, None where it has none; UserError for what cannot be read."""
    try:
        node = OmegaConf.load(path).get("table")
        return None if node is None else read_table(node)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{path} is no preset: {one_line(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def checked(preset: Preset, path: Path) -> Preset:
    """The preset; UserError for a word of it that the paper's file does not have."""
    check_words(f"{path}: table.tables", preset.axes.tables, {table.table for table in preset.paper.tables})
    named = [table for table in preset.paper.tables if table.table in preset.axes.tables]
    rows = [row for table in named for row in table.rows]
    allowed = {
        "methods": {row.method for row in rows} | {f"{row.method} ({row.label})" for row in rows if row.label},
        "missing": {name for table in preset.paper.tables for row in table.rows for name in names(row)},
        **dict.fromkeys(("models", "mini_models"), columns(named)),
        **dict.fromkeys(("metrics", "mini_metrics"), {name.removeprefix(DELTA) for row in rows for name in row.values}),
    }
    for key, words in allowed.items():
        check_words(f"{path}: table.{key}", getattr(preset.axes, key), words)
    check_closed(preset.axes, path)
    return preset


def check_closed(axes: Table, path: Path) -> None:
    """Raise UserError for a method that leaves open at which value of an axis it stands.

    Setting and bits are the published column's and row's; seeds are averaged.
    """
    swept = {key for scale in SCALES for key, value in (getattr(axes, scale) or {}).items() if "," in str(value)}
    for name, value in axes.methods.items():
        wanted = axes.overrides(name)
        left = swept - {"setting", "bits", "seed"} - {override.partition("=")[0] for override in wanted}
        if left and wanted != ["method=fp32"]:  # full precision is the same wherever it stands
            raise UserError(f"{path}: table.methods: {name}: {value} leaves {', '.join(sorted(left))} open")


def names(row: PublishedRow) -> list[str]:
    """How a preset may name a published row, the closest first."""
    labelled = [f"{row.method} ({row.label})"] if row.label else []
    return [*labelled, f"{row.method} {row.bits}", row.method]


def columns(tables: Iterable[published.Table]) -> set[str]:
    """MODEL, MODEL/DATASET, MODEL/DATASET/STEPS of every table."""
    words = [(str(table.model), str(table.dataset), str(table.steps)) for table in tables]
    return {"/".join(parts[:count]) for parts in words for count in (1, 2, 3)}


def check_words(key: str, words: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise UserError for the first word that is not allowed."""
    for word in words:
        check_choice(key, word, sorted(allowed))
