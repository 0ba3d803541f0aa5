"""Weights of feature extractors: found before anything is sampled, never downloaded."""

from __future__ import annotations

from pathlib import Path

from dqbench.config import digest
from dqbench.errors import UserError
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
    """Hash of a weights file, or of the files of a weights folder that decide its outputs."""
    if path.is_file():
        return sha256(path)
    return digest([sha256(path / name) for name in ("config.json", "model.safetensors")])
