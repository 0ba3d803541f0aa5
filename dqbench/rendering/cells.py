"""The run ids of a preset's cells. Composing a config takes a good part of a second, so that they are kept on disk."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dqbench.config import Bits, compose, data_root, expand
from dqbench.errors import check_choice
from dqbench.identity import digest, run_id
from dqbench.results import atomic_write

Axes = Mapping[str, Sequence[str]]  # key -> overrides of it


@dataclass
class RunIds:
    """What compose() and run_id() say of cells, kept in a file that is void once any config has changed."""

    path: Path
    known: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = configs_state()
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.known = content["cells"] if content["state"] == self.state else {}
        except (OSError, ValueError, KeyError, TypeError):  # absent, damaged or foreign: it is computed again
            self.known = {}
        self.read = len(self.known)

    def of(self, preset: str, scale: str, wanted: Sequence[str], bits: str, axes: Axes) -> list[str]:
        """The run ids of a cell, one per seed."""
        key = json.dumps([preset, scale, list(wanted), bits, {name: list(axes[name]) for name in axes}])
        if key not in self.known:
            self.known[key] = run_ids(preset, scale, tuple(wanted), bits, axes)
        return self.known[key]

    def save(self) -> None:
        """Keep what is new."""
        if len(self.known) > self.read:
            atomic_write(self.path, json.dumps({"state": self.state, "cells": self.known}, sort_keys=True) + "\n")


def configs_state(*more: Path) -> str:
    """A digest of everything that run ids depend on, and of `more` files."""
    roots = {data_root(), Path.cwd()}
    files = sorted({path for root in roots for group in ("conf", "sweeps") for path in (root / group).rglob("*.yaml")})
    files += [*(Path(__file__).parents[1] / name for name in ("config.py", "identity.py")), *more]
    versions = [version(name) for name in ("hydra-core", "omegaconf")]
    return digest([versions, [[str(path), path.read_text(encoding="utf-8", errors="replace")] for path in files]])


@functools.cache
def model_of(setting: str) -> str:
    """The model of a setting, read from its file's defaults list."""
    conf = data_root() / "conf"
    check_choice("setting", setting, sorted(path.stem for path in (conf / "setting").glob("*.yaml")))
    entries = OmegaConf.load(conf / "setting" / f"{setting}.yaml").get("defaults", [])
    chosen = next((entry["override /model"] for entry in entries if "override /model" in entry), None)
    if chosen is None:
        return compose([f"setting={setting}"]).model.name
    return OmegaConf.load(conf / "model" / f"{chosen}.yaml").name


def key_of(override: str) -> str:
    """`method` of `method=tfmq`."""
    return override.partition("=")[0]


def axis(key: str, value: object) -> tuple[str, ...]:
    """An axis as overrides, split as Hydra does."""
    return tuple(cell[0] for cell in expand([f"{key}={value}"]))


def bits_file(name: str) -> Path:
    """conf/bits/NAME.yaml."""
    return data_root() / "conf" / "bits" / f"{name}.yaml"


def run_ids(preset: str, scale: str, wanted: tuple[str, ...], bits: str, axes: Axes) -> list[str]:
    """The run ids of a cell, one per seed. Axes that `wanted` leaves open, as full precision may, take their first."""
    taken = {*map(key_of, wanted), "bits", "seed"}
    rest = [overrides[0] for key, overrides in axes.items() if key not in taken]
    own = any(override.startswith("bits.") for override in (*wanted, *rest))  # then bits cannot be put in afterwards
    cfg = composed(preset, scale, (*rest, *([f"bits={bits}"] if own else []), *wanted))
    if not own:
        cfg.bits = bits_node(bits)
    found = []
    for seed in [int(override.partition("=")[2]) for override in axes.get("seed", ())] or [cfg.seed]:
        cfg.seed = seed
        found.append(run_id(cfg))
    return found


@functools.cache
def composed(preset: str, scale: str, overrides: tuple[str, ...]) -> DictConfig:
    """A cell's config. No other key depends on bits and seed, which can be put in later."""
    return compose([f"+sweeps={preset}", f"scale={scale}", *overrides])


@functools.cache
def bits_node(name: str) -> DictConfig:
    """A choice of bits."""
    return OmegaConf.merge(OmegaConf.structured(Bits), OmegaConf.load(bits_file(name)))
