"""Where a row comes from: code, libraries, machine, and the hashes of what went in.

A stage's artifact carries stamp(), the state in which it was made; a row combines the stamps of its artifacts.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dqbench import processes
from dqbench.config import data_root

LIBRARIES = (
    "accelerate",
    "clean-fid",
    "diffusers",
    "dqbench",
    "hydra-core",
    "lm-eval",
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
Stamp = Mapping[str, Any]


def provenance(
    device: str,
    dtype: str,
    checkpoint_hash: str,
    reference_hash: str | None,
    weights_hash: str | None = None,
    stamps: Mapping[str, Stamp] | None = None,
) -> dict[str, Any]:
    """What a row records beside its numbers. stamps: those of its artifacts, by stage; None: all was made just now.

    git_commit and git_dirty are None outside a checkout of dqbench; weights_hash is that of the feature extractor.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **combine(stamps or {"row": stamp(device)}),
        "dtype": dtype,
        "checkpoint_hash": checkpoint_hash,
        "reference_hash": reference_hash,
        "weights_hash": weights_hash,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def stamp(device: str) -> dict[str, Any]:
    """The state in which an artifact is made, for its manifest: code, libraries, device, its arithmetic, processes."""
    commit, dirty = _our_git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "device": device,
        "num_processes": processes.joined(),
        **(_cuda(device) if device.startswith("cuda") else {"device_name": platform.processor() or platform.machine()}),
    }


def combine(stamps: Mapping[str, Stamp]) -> dict[str, Any]:
    """One stamp of several: a value they share, else None and each stage's own under `stages`. Dirty if any is."""
    keys = list(dict.fromkeys(key for one in stamps.values() for key in one))
    values = {key: [one.get(key) for one in stamps.values()] for key in keys}
    mixed = [key for key in keys if any(value != values[key][0] for value in values[key])]
    common = {key: None if key in mixed else values[key][0] for key in keys}
    if True in values["git_dirty"]:
        common["git_dirty"] = True
    stages = {stage: {key: one.get(key) for key in mixed} for stage, one in stamps.items()} if mixed else {}
    return {**common, "stages": stages}


def _cuda(device: str) -> dict[str, Any]:
    """The GPU's name, and what decides how it rounds."""
    import torch

    return {
        "device_name": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "tf32_matmul": _flag(lambda: torch.backends.cuda.matmul.allow_tf32),
        "tf32_cudnn": _flag(lambda: torch.backends.cudnn.allow_tf32),
        "matmul_precision": _flag(torch.get_float32_matmul_precision),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _flag(read: Callable[[], bool | str]) -> bool | str:
    """A TF32 setting; torch refuses to tell one that was set through its older and its newer interface at once."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


@functools.cache
def _our_git_state() -> tuple[str | None, bool | None]:
    """git_state() of the code that runs, as it was when first asked: what was imported does not change later."""
    return git_state()


@functools.cache
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
