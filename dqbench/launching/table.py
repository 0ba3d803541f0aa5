"""The `table:` node of a preset in sweeps/: its axes at both scales, and which paper's table it regenerates.

scale=mini, the default, has the axes on the embedded miniatures, scale=full with the paper's own models and protocol.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqbench.config import Config, compose, expand
from dqbench.errors import UserError, check_choice

SCALES = ("mini", "full")


@dataclass
class Table:
    """What a preset says of itself beside its cells. Keys of `methods` and others are words of the published file."""

    caption: str = ""
    study: str | None = None  # a module of dqbench.studies that writes pages of the rows
    paper: str | None = None  # dqbench/published/PAPER.yaml
    tables: list[str] = field(default_factory=list)  # names of tables in that file
    methods: dict[str, Any] = field(default_factory=dict)  # METHOD or "METHOD (LABEL)" -> a method, or overrides
    models: dict[str, str] = field(default_factory=dict)  # MODEL, MODEL/DATASET or MODEL/DATASET/STEPS -> setting
    mini_models: dict[str, str] = field(default_factory=dict)  # the same -> setting at scale=mini
    bits: dict[str, str] = field(default_factory=dict)  # wXaY as published -> choice of bits, where it has another name
    metrics: dict[str, str] = field(default_factory=dict)  # published metric -> ours at scale=full
    mini_metrics: dict[str, str] = field(default_factory=dict)  # published metric -> ours at scale=mini
    missing: dict[str, str] = field(default_factory=dict)  # what is published and has no cell -> why
    mini_notes: list[str] = field(
        default_factory=list
    )  # in what cells at scale=mini differ from the method as published
    mini: dict[str, Any] | None = None  # axes: override -> values
    full: dict[str, Any] | None = None

    def overrides(self, method: str, label: str | None = None) -> list[str] | None:
        """What selects a published method, `label` being its bits_extra's; None where nothing here does."""
        value = self.methods.get(f"{method} ({label})" if label else method)
        return [f"method={value}"] if isinstance(value, str) else value

    def setting(self, scale: str, model: str, dataset: str, steps: int | None) -> str | None:
        """The setting that stands for a published column; the longest key that fits wins. None: nothing does."""
        settings = self.mini_models if scale == "mini" else self.models
        names = (f"{model}/{dataset}/{steps}", f"{model}/{dataset}", model)
        return next((settings[name] for name in names if name in settings), None)


def read_table(node: DictConfig) -> Table:
    """The node as a Table; UserError for a misspelt key or a wrong type."""
    from dqbench.launching.explain import explain

    try:
        table = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Table), node))
    except OmegaConfBaseException as error:
        raise UserError(explain(error, "table")) from error
    for scale in SCALES:
        check_axes(f"table.{scale}", getattr(table, scale) or {})
    if table.study is not None:
        check_choice("table.study", table.study, studies())
    if not table.caption and not table.study:
        raise UserError("table.caption is missing; needed: what the cells of the preset are, in a few words")
    return table


def studies() -> list[str]:
    """The modules of dqbench.studies that a preset may name."""
    found = pkgutil.iter_modules([str(Path(__file__).parents[1] / "studies")])
    return sorted(module.name for module in found if module.name != "page")  # what they share


def check_axes(where: str, axes: Mapping[str, Any]) -> None:
    """Raise UserError for an axis that is no key of the configuration and no group that sets some."""
    from dqbench.launching.explain import suggestion

    allowed = [*Config.__annotations__, "setting"]
    for axis in axes:
        name = re.split(r"[./@]", axis.lstrip("+~"))[0]
        if name not in allowed:
            line = f"{where}.{axis} is unknown; {suggestion(name, allowed)}"
            raise UserError(f"{line}allowed: {', '.join(allowed)}, and keys and groups below them")


def check_scale(cfg: DictConfig) -> None:
    """Raise UserError for a scale that does not exist, or that the preset has no axes for."""
    check_choice("scale", cfg.scale, SCALES)
    if cfg.table is None and cfg.scale != SCALES[0]:
        raise UserError(f"scale={cfg.scale} has no meaning without a preset of a paper's table; see +sweeps=")
    if cfg.table is None:
        return
    table = read_table(cfg.table)
    there = [scale for scale in SCALES if getattr(table, scale)]
    if there or cfg.scale != SCALES[0]:
        check_choice("scale", cfg.scale, there or SCALES[:1])


def axes(cfg: DictConfig) -> list[str]:
    """What a preset sweeps, from a config with its hydra node; what the command line gives comes after it and wins."""
    check_scale(cfg)
    return [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]


def sweep(overrides: list[str]) -> list[list[str]]:
    """The cells that a command line names, each as a list of overrides; one for what is no sweep."""
    first = next(expand(overrides))  # Hydra composes single values alone; the axes are the same for all
    return list(expand([*axes(compose(first, hydra_node=True)), *overrides]))
