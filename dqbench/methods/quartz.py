"""QuaRTZ (Kim et al. 2025, arXiv:2509.26436): 8-bit activations, then leading-zero suppression to 4 bits.

Published: dynamic activations, groups of 16 or 32 channels, truncation. Not published, so chosen: one scale per token,
symmetric; INT4 weights in groups with fp16 scales; q, k, v are suppressed as layer inputs are, softmax outputs are
plain unsigned codes. (An integer softmax V would need V's scales outside of its sum over tokens; q and k need nothing.)
A token's largest code is 127 and 3 bits make 112 of it, so that LZS costs a lone channel an eighth of every value:
layers of few input channels stay at 8 bits. bits.act = 4 is the method; 8 is its stage 1: the rest is what LZS costs.
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
from dqbench.quant.dynamic import LzsForm, LzsQuantizer
from dqbench.quant.dynamic_attach import apply, channels_of, finish, plan_for, quantize_qkv
from dqbench.quant.lzs_theory import theory_check
from dqbench.quant.plan import LAYER_TYPES, Plan
from dqbench.quant.quantizers import ActRule
from dqbench.quant.zero_suppression import CODE_BITS

STAGE_1_BITS = 8
WIDTHS = (CODE_BITS, STAGE_1_BITS, *OFF)


@dataclass
class QuaRTZ:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: BlockFormat
    act: LzsForm
    softmax: ActRule
    attention: bool  # quantize the attention matmuls
    stage_1_below: int  # input channels: layers with fewer have no group worth a flag, and keep the 8 bits of stage 1
    theory_rows: int  # calibration rows that theory_check sees; 0: none

    def __post_init__(self) -> None:
        if self.weight.element != "int":
            raise UserError(f"method.weight.element={self.weight.element}; allowed with QuaRTZ: int")
        if self.theory_rows < 0:
            raise UserError(f"method.theory_rows={self.theory_rows} is out of range; allowed: 0 or more")

    def check_bits(self, bits: Bits) -> None:
        """Raise UserError for activation widths that QuaRTZ has no meaning for."""
        given = {f"override {pattern}, act": own["act"] for pattern, own in self.overrides.items() if "act" in own}
        given |= {"bits.attention": bits.attention} if self.attention else {}
        for key, width in {"bits.act": bits.act, **given}.items():
            if width not in WIDTHS:
                raise UserError(f"{key}={width} with method={self.name}; allowed: 4 (LZS), 8 (its stage 1), 16 or 32")

    def plan(self, network: nn.Module, bits: Bits) -> Plan:
        """What is quantized and stored; `network` may be on the meta device."""
        self.check_bits(bits)
        layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LAYER_TYPES)]
        narrow = [name for name, layer in layers if channels_of(layer) < self.stage_1_below and bits.act == CODE_BITS]
        wide = {"act": STAGE_1_BITS}
        given = {name: wide for name in narrow if name not in self.overrides}
        given |= {pattern: wide | own if pattern in narrow else own for pattern, own in self.overrides.items()}
        return plan_for(network, bits, self.skip, given, self.weight, self.quantizer)

    def quantizer(self, n_bits: int, axis: int) -> LzsQuantizer:
        """Of an activation with its channels at `axis`."""
        return LzsQuantizer(self.act, n_bits, axis)

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights to nearest, dynamic activations; calibration serves static scales, softmax ranges, theory_check."""
        quantized = clone(pipe)
        student, plan = denoiser(quantized), self.plan(denoiser(pipe), bits)
        if self.theory_rows:
            layers = [name for name, own in plan.items() if own.act not in OFF]
            student.diagnostics = theory_check(denoiser(pipe), layers, calib, self.act, self.theory_rows)
        apply(student, plan, self.weight, self.quantizer)
        if self.attention:
            quantize_qkv(student, bits, self.quantizer)
        finish(student, calib, self.softmax)
        return quantized
