"""PTQ4DM: Post-Training Quantization on Diffusion Models (Shang et al. 2022, arXiv:2211.15736).

Calibration at normally distributed time steps (NDTC, Eq. 15; conf/calib/ndtc.yaml), its own 100-candidate symmetric
range search, running activation ranges, no learning. Table 1's operation selection quantizes the sampler's mean,
variance, sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from dqbench.arguments import SAMPLES
from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, Sampler
from dqbench.errors import UserError, check_choice
from dqbench.models import clone, denoiser
from dqbench.quant.attach import calibrating, freeze, prepare, quantize_attention, quantize_inputs
from dqbench.quant.plan import matches, select
from dqbench.quant.quantizers import ActRule, WeightRule
from dqbench.schedulers import quantize_operations

OPERATION_SAMPLERS = "allowed: DDIMScheduler or DDPMScheduler with sampler.spacing leading, trailing or linspace"


@dataclass
class PTQ4DM:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightRule
    act: ActRule
    act_site: str  # input | output: which side of a layer is quantized
    full_output: list[str]  # with act_site output: layers whose output stays in full precision
    attention: bool  # quantize the attention matmuls
    quantize_mu: bool  # 8-bit mean of the sampler's step
    quantize_sigma: bool  # 8-bit standard deviation of the sampler's step
    quantize_x: bool  # 8-bit x_{t-1}

    modalities = ("image",)

    def __post_init__(self) -> None:
        check_choice("method.act_site", self.act_site, ("input", "output"))

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights by the symmetric search; activation ranges run along the calibration set, both being quantized."""
        quantized = clone(pipe)
        quantized.scheduler = self.quantize_operations(quantized.scheduler, calib)
        student = denoiser(quantized)
        plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        layers = prepare(student, plan, self.weight, splits={})
        observed = {name: item for name, item in layers.items() if not matches(name, self.full_output)}
        quantize_inputs(observed, self.act.signed, site=self.act_site)
        if self.attention:
            quantize_attention(student, bits, self.act.signed, signed_softmax=False)
        with calibrating(student, self.act):
            for batch in calib.batches(pipe.device):
                student(**batch)
        freeze(student)
        return quantized

    def check(self, sampler: Sampler, scheduler: Any) -> None:
        """Raise UserError where the sampler has no such operation to quantize."""
        chosen = self.operations
        if chosen and type(scheduler) not in (DDIMScheduler, DDPMScheduler):
            given = f"sampler.scheduler={sampler.scheduler} with sampler.spacing={sampler.spacing}"
            raise UserError(f"method.quantize_{chosen[0]}=true is not defined for {given}; {OPERATION_SAMPLERS}")
        if "sigma" in chosen and sampler.scheduler == "DDIMScheduler" and sampler.eta == 0:
            raise UserError(
                "method.quantize_sigma=true has no effect at sampler.eta=0; allowed: sampler.eta > 0, or DDPM"
            )

    @property
    def operations(self) -> list[str]:
        """What is quantized in the sampler's step."""
        switches = {"mu": self.quantize_mu, "sigma": self.quantize_sigma, "x": self.quantize_x}
        return [name for name, on in switches.items() if on]

    def quantize_operations(self, scheduler: Any, calib: CalibrationSet) -> Any:
        """The scheduler with its chosen operations quantized; their range is that of the calibration samples."""
        if not self.operations:
            return scheduler
        name = next(name for name in SAMPLES if name in calib.inputs)
        bound = max(float(batch[name].abs().max()) for batch in calib.batches())
        return quantize_operations(scheduler, self.operations, bound)
