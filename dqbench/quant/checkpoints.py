"""Units that are finished, kept on disk: a reconstruction that was stopped goes on after the last of them."""

from __future__ import annotations

import logging

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqbench import processes
from dqbench.stages import scratch

log = logging.getLogger(__name__)


class Checkpoints:
    """Tensors of finished units in the current stage's scratch folder; nothing is kept outside a stage."""

    def __init__(self, phase: str) -> None:
        self.folder = scratch(phase)

    def load(self, unit: str, tensors: dict[str, Tensor]) -> bool:
        """Copy a finished unit's tensors in place; False where the unit is not finished."""
        if self.folder is None or not (file := self.folder / f"{unit}.safetensors").exists():
            return False
        try:
            stored = load_file(file)
        except SafetensorError as error:
            log.warning("checkpoint %s is damaged (%s): learning this unit again", file, error)
            return False
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])
        return True

    def save(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Store a finished unit's tensors, atomically."""
        if self.folder is not None and processes.is_main():
            partial = self.folder / f"{unit}.partial"
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
            partial.replace(self.folder / f"{unit}.safetensors")
