"""Q-Diffusion: Quantizing Diffusion Models (Li et al. 2023, arXiv:2302.04304).

Calibration inputs uniform over the sampler's steps (section 3.2), block reconstruction of the weights,
shortcut-splitting quantization (section 3.3), then learned activation steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dqbench.calibration import CalibrationSet, named_generator
from dqbench.config import Bits, Recon
from dqbench.errors import UserError
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant.attach import (
    calibrating,
    find_units,
    freeze,
    prepare,
    quantize_attention,
    quantize_inputs,
)
from dqbench.quant.plan import select, split
from dqbench.quant.quantizers import ActRule, WeightRule
from dqbench.quant.reconstruct import Job, reconstruct_activations, reconstruct_weights
from dqbench.quant.shortcuts import skip_splits


@dataclass
class QDiffusion:
    name: str
    version: int
    recon: Recon
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightRule
    act: ActRule
    softmax: ActRule
    attention: bool  # quantize the attention matmuls
    split: bool  # shortcut-splitting quantization
    running: bool  # after the initial ranges, follow the whole calibration set by act.over

    together = True  # several processes divide the mini-batches of its reconstruction

    def __post_init__(self) -> None:
        if self.running and self.act.over == "first":
            raise UserError(
                "method.running=true follows no more batches with method.act.over=first; allowed: all, ema, ema_search"
            )

    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights first with activations in full precision, then activations with weights fixed."""
        quantized = clone(pipe)
        student, family = denoiser(quantized), anatomy(pipe)
        splits = skip_splits(student, calib.rows([0], pipe.device), family.shortcuts) if self.split else {}
        plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        layers = prepare(student, split(plan, list(splits)), self.weight, splits)
        units = find_units(student, family.units, layers)
        job = Job(student, denoiser(pipe), units, layers, calib, self.recon, family.official_order)
        reconstruct_weights(job)
        quantize_inputs(layers, self.act.signed)
        if self.attention:
            quantize_attention(student, bits, self.act.signed, self.softmax.signed)
        self.choose_act_ranges(student, calib)
        reconstruct_activations(job)
        freeze(student)
        return quantized

    @torch.no_grad()
    def choose_act_ranges(self, student: nn.Module, calib: CalibrationSet) -> None:
        """Initial ranges from recon.act_init_samples rows in one forward pass; if `running`, then the whole set."""
        count = min(self.recon.act_init_samples, len(calib))
        generator = named_generator("activation ranges", calib.seed)
        rows = (
            torch.randperm(len(calib), generator=generator)[:count]
            if self.recon.act_init == "random"
            else torch.arange(count)
        )
        device = next(student.parameters()).device
        with calibrating(student, self.act, self.softmax):
            student(**calib.rows(rows.numpy(), device))
            if self.running:
                for batch in calib.batches(device):
                    student(**batch)
