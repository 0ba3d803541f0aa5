"""The name of a run: a digest of the configuration that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

NOT_HASHED = ("hydra", "tracking", "paths", "runtime", "table", "scale", "debug", "base", "published")
THROUGHPUT = {"sampler": ("batch_size",), "metrics": ("batch_size", "protocol.batch_size")}  # speed, not the result
ADDED = {"calib": ("mask",)}  # keys that came after the first rows: not hashed where they are null


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What a run's numbers depend on: the resolved config without NOT_HASHED and THROUGHPUT.

    Of a file with weights of a metric only the name counts, not the folder it lies in.
    """
    content = {key: hashed(key, cfg._get_node(key)) for key in cfg if key not in NOT_HASHED}
    for group, keys in THROUGHPUT.items():
        content[group] = without(content[group], keys)
    if weights := content["metrics"].get("weights"):
        content["metrics"]["weights"] = Path(weights).name
    return content


def without(content: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """`content` without `keys`; a.b is the key b of the mapping content[a], where that is one."""
    left = {key: value for key, value in content.items() if key not in keys}
    for key, value in left.items():
        inner = [dotted.removeprefix(f"{key}.") for dotted in keys if dotted.startswith(f"{key}.")]
        left[key] = without(value, inner) if inner and isinstance(value, dict) else value
    return left


def hashed(group: str, node: Any) -> Any:
    """plain(node) without keys of ADDED that are null, so that a new key leaves the names of earlier rows alone."""
    content = plain(node)
    unset = [key for key in ADDED.get(group, ()) if content.get(key) is None]
    return {key: value for key, value in content.items() if key not in unset} if unset else content


def plain(node: Any) -> Any:
    """Resolved plain containers of an OmegaConf node or value."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return node._value() if hasattr(node, "_value") else node


def digest(content: Any) -> str:
    """12 hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_id(cfg: DictConfig) -> str:
    """The run's name: digest of identity(cfg)."""
    return digest(identity(cfg))
