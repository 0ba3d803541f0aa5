"""Round to nearest: the plain baseline. No learning; ranges are min-max, of weights and of what calibration shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits
from dqbench.models import clone, denoiser
from dqbench.quant.attach import calibrating, freeze, prepare, quantize_attention, quantize_inputs
from dqbench.quant.plan import select
from dqbench.quant.quantizers import ActRule, WeightRule


@dataclass
class RTN:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightRule
    act: ActRule
    attention: bool  # quantize the attention matmuls

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights to nearest; activation ranges over the whole calibration set."""
        quantized = clone(pipe)
        student = denoiser(quantized)
        plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        layers = prepare(student, plan, self.weight, splits={})
        quantize_inputs(layers, self.act.signed)
        if self.attention:
            quantize_attention(student, bits, self.act.signed, signed_softmax=False)
        with calibrating(student, self.act):
            for batch in calib.batches(pipe.device):
                student(**batch)
        freeze(student)
        return quantized
