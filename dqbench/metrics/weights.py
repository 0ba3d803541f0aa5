"""Weights of feature extractors: found before anything is sampled, never downloaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from dqbench.errors import UserError
from dqbench.identity import digest
from dqbench.stages import sha256

ZOO = Path(__file__).parent.parent / "zoo"


def find_weights(weights: str | None, default: Path) -> Path:
    """The file or folder behind `metrics.weights` (a path, zoo:NAME, or None: `default`). UserError if absent."""
    if weights is None:
        path = default
    elif weights.startswith("zoo:"):
        path = ZOO / weights.removeprefix("zoo:")
    else:
        path = Path(weights).expanduser()
    if not path.exists():
        wanted = f"{default.name} is needed: put it into {default.parent} or set metrics.weights=PATH"
        raise UserError(f"no weights at {path}; {wanted}")
    return path


def hash_weights(path: Path) -> str:
    """Hash of a weights file, or of the files of a weights folder that decide its outputs; read once per process."""
    if path.is_file():
        return _hash_once(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns)
    return digest([hash_weights(path / name) for name in ("config.json", "model.safetensors")])


@lru_cache
def _hash_once(path: Path, size: int, changed: int) -> str:
    return sha256(path)
