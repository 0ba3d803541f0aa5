"""Where a row comes from: code, libraries, machine, and the hashes of what went in. Imports no library it names."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dqbench.config import data_root

LIBRARIES = (
    "accelerate",
    "clean-fid",
    "diffusers",
    "dqbench",
    "hydra-core",
    "numpy",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "torch-fidelity",
    "torchmetrics",
    "torchvision",
    "transformers",
)
CODE = ("dqbench", "conf", "sweeps", "pyproject.toml", "requirements.lock")  # what `dirty` looks at


def provenance(device: str, dtype: str, checkpoint_hash: str, reference_hash: str | None) -> dict[str, Any]:
    """What a row records beside its numbers. git_commit and git_dirty are None outside a checkout of dqbench."""
    commit, dirty = git_state()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": dirty,
        "device": device,
        "dtype": dtype,
        "checkpoint_hash": checkpoint_hash,
        "reference_hash": reference_hash,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def version(library: str) -> str | None:
    """The installed version of a library, None where it is absent."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def git_state(root: Path | None = None) -> tuple[str | None, bool | None]:
    """(commit, whether code or configs differ from it) of the checkout at root, by default ours; Nones if none is."""
    root = root or data_root()
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():  # an installed package may lie inside somebody else's checkout
        return None, None
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *CODE)
    return commit or None, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command that takes no lock; None where git is absent or refuses."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # as set inside git hooks
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
