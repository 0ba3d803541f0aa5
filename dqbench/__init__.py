"""dqbench: reproduce, compare and extend post-training quantization (PTQ) of diffusion models.

From Python: `row = dqbench.run(["method=ptq4dm", "bits=w8a8"])`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`dqbench.run` without importing torch until it is asked for; the module can be called."""
    if name == "run":
        return import_module("dqbench.run")
    raise AttributeError(f"module 'dqbench' has no attribute {name!r}")
