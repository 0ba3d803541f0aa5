"""Block formats as baselines: weights and dynamic activations to nearest in INT4 groups, MXFP4 or NVFP4.

bits.weight and bits.act are the width of the elements. INT formats take any. FP4 formats are 4-bit: with bits.act = 8
their activations are INT8 per token, which is what QuaRTZ has there too, so that the weights' format is compared alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.errors import UserError
from dqbench.models import clone, denoiser
from dqbench.quant.block_formats import BlockFormat
from dqbench.quant.dynamic import BlockQuantizer
from dqbench.quant.dynamic_attach import apply, finish, plan_for, quantize_qkv
from dqbench.quant.plan import Plan
from dqbench.quant.quantizers import ActRule

FP4_BITS = 4
INT8 = BlockFormat("int", None, "fp16")  # of 8-bit activations beside FP4 weights


@dataclass
class BlockFormatRTN:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: BlockFormat
    act: BlockFormat
    softmax: ActRule
    attention: bool  # quantize the attention matmuls

    def check_bits(self, bits: Bits) -> None:
        """Raise UserError for widths that the formats do not have."""
        given = {"bits": {"weight": bits.weight, "act": bits.act}, **self.overrides}
        given["bits"] |= {"attention": bits.attention} if self.attention else {}
        for where, own in given.items():
            for key, width in own.items():
                form, more = (self.weight, ()) if key == "weight" else (self.act, (8,))
                allowed = (FP4_BITS, *more, *OFF)
                if form.element == "e2m1" and width not in allowed:
                    known = ", ".join(map(str, allowed))
                    raise UserError(f"{where}.{key}={width} with method={self.name}, an FP4 format; allowed: {known}")

    def plan(self, network: nn.Module, bits: Bits) -> Plan:
        """What is quantized and stored; `network` may be on the meta device."""
        self.check_bits(bits)
        return plan_for(network, bits, self.skip, self.overrides, self.weight, self.quantizer)

    def quantizer(self, n_bits: int, axis: int) -> BlockQuantizer:
        """Of an activation with its channels at `axis`."""
        fits = self.act.element == "int" or n_bits == FP4_BITS
        return BlockQuantizer(self.act if fits else INT8, n_bits, axis)

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights to nearest, dynamic activations; calibration serves NVFP4's static scales and softmax ranges."""
        quantized = clone(pipe)
        student = denoiser(quantized)
        apply(student, self.plan(student, bits), self.weight, self.quantizer)
        if self.attention:
            quantize_qkv(student, bits, self.quantizer)
        finish(student, calib, self.softmax)
        return quantized
