"""Full precision: the row that every other row is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits


@dataclass
class FP32:
    name: str
    version: int

    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """The pipeline itself, whatever the bits."""
        return pipe
