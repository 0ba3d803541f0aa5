"""TFMQ-DM: Temporal Feature Maintenance Quantization (Huang et al. 2024, arXiv:2311.16503), and its extension.

TIAR reconstructs all time embedding layers as one block, FSC gives activations ranges per sampling step. Temporal
Feature Matters (arXiv:2407.19547) adds caching (CM) and a choice between both (DS); no code of it was released, so both
are our reading of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from dqbench.arguments import Batch
from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits, Calib, Recon, Sampler
from dqbench.errors import UserError, check_choice
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant.attach import find_units, freeze, prepare, quantize_attention, quantize_inputs
from dqbench.quant.clock import attach_clock, per_step, step_quantizers
from dqbench.quant.feature_cache import attach_cache, drop_unused, make_cache
from dqbench.quant.plan import select, split
from dqbench.quant.quantizers import ActRule, WeightRule, act_quantizers
from dqbench.quant.reconstruct import Job, reconstruct_weights
from dqbench.quant.running import (
    RunningMinMax,
    calibrate_static,
    calibrate_steps,
    check_every_step,
    check_steps,
)
from dqbench.quant.shortcuts import skip_splits
from dqbench.quant.temporal import Features, TemporalBlock, distinct_rows, members, reconstruct_block, trace_block
from dqbench.quant.temporal_error import (
    check_cacheable,
    choose_cached,
    error_curves,
    error_table,
    network_features,
    temporal_curves,
)
from dqbench.sampling import steps_of


@dataclass
class Tiar:
    """Joint reconstruction of the temporal block. timesteps: none (off) | all | calibration: one row for each."""

    timesteps: str


@dataclass
class Fsc:
    """Activation ranges per sampling step. scope: none (off) | tib (the temporal block's layers) | all."""

    scope: str


@dataclass
class Maintenance:
    """How temporal features are kept. kind: tm (TIAR and FSC) | cm (cached) | ds (whichever errs less).

    granularity of ds: ti (per timestep and head) | i (per head) | global; metric: mse | cosine; cache_bits: null is
    bits.act.
    """

    kind: str
    granularity: str
    metric: str
    cache_bits: int | None


@dataclass
class Temporal:
    """A pipeline's temporal block, its sampler's distinct timesteps, and features of `rows`: exact, and as `found`."""

    block: TemporalBlock
    steps: list[float]
    rows: Batch
    exact: Features
    found: dict[str, Features]

    @classmethod
    def of(cls, pipe: DiffusionPipeline, calib: CalibrationSet, size: int) -> Temporal:
        """Trace the full-precision network; `size`: rows that the block takes at once, at most."""
        visited = steps_of(pipe) if getattr(pipe, "sampler", None) is not None else calib.inputs["timestep"]
        steps = sorted({float(t) for t in np.asarray(visited)}, reverse=True)
        batch = calib.rows(np.arange(min(size, len(steps))) % len(calib), pipe.device)
        block = trace_block(denoiser(pipe), batch, anatomy(pipe).time_embedding)
        rows = distinct_rows(block, calib, steps, pipe.device)
        return cls(block, steps, rows, block.features(denoiser(pipe), rows), {})

    def diagnostics(self) -> dict[str, Any]:
        """Groups of curves: how close the quantized network's features are, and what each part did to their error."""
        timestep, last = self.rows["timestep"], list(self.found.values())[-1]
        shown = error_curves(timestep, self.exact, self.found)
        return shown | temporal_curves(timestep, last, self.exact, self.block.heads)


@dataclass
class TFMQ:
    name: str
    version: int
    recon: Recon
    weight_every: int  # weights are reconstructed on the calibration rows of every n-th sampling step
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightRule
    act: ActRule
    attention: bool  # quantize the attention matmuls
    split: bool  # shortcut-splitting quantization (Q-Diffusion)
    tiar: Tiar
    fsc: Fsc
    maintenance: Maintenance

    modalities = ("image",)
    together = True  # several processes divide the mini-batches of its reconstruction

    def __post_init__(self) -> None:
        check_choice("method.tiar.timesteps", self.tiar.timesteps, ("none", "all", "calibration"))
        check_choice("method.fsc.scope", self.fsc.scope, ("none", "tib", "all"))
        check_choice("method.maintenance.kind", self.maintenance.kind, ("tm", "cm", "ds"))
        check_choice("method.maintenance.granularity", self.maintenance.granularity, ("ti", "i", "global"))
        check_choice("method.maintenance.metric", self.maintenance.metric, ("mse", "cosine"))
        cache_bits = self.maintenance.cache_bits
        if self.weight_every < 1:
            raise UserError(f"method.weight_every={self.weight_every} is out of range; allowed: 1 or more")
        if cache_bits is not None and not (2 <= cache_bits <= 8 or cache_bits in OFF):
            raise UserError(f"method.maintenance.cache_bits={cache_bits}; allowed: null, 2 to 8, or 32")

    @property
    def stepwise(self) -> bool:
        """Whether activation ranges change from step to step."""
        return self.fsc.scope != "none"

    def check_calib(self, calib: Calib, sampler: Sampler, bits: Bits) -> None:
        """Raise UserError where a step of the sampler would have no calibration rows to choose its ranges from."""
        if self.stepwise and bits.act not in OFF:
            check_steps(calib, sampler.steps, [[step] for step in range(sampler.steps)])

    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """The temporal block first, the other weights around it, then activations, then caches where they serve."""
        quantized = clone(pipe)
        student, teacher, family = denoiser(quantized), denoiser(pipe), anatomy(pipe)
        splits = skip_splits(student, calib.rows([0], pipe.device), family.shortcuts) if self.split else {}
        plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        layers = prepare(student, split(plan, list(splits)), self.weight, splits)
        units = find_units(student, family.units, layers)
        rows = calib.where(calib.step % self.weight_every == 0)
        job = Job(student, teacher, units, layers, rows, self.recon, family.official_order)
        time = Temporal.of(pipe, calib, self.recon.batch_size)
        if self.maintenance.kind != "tm":
            check_cacheable(time.block.inputs)
        if self.stepwise and bits.act not in OFF:
            check_every_step(time.steps, calib)
        self.learn_weights(job, time)
        self.quantize_activations(job, time, calib, bits)
        if self.maintenance.kind != "tm" and members(job, time.block):
            self.cache(student, time, calib, bits)
        time.found[self.maintenance.kind.upper()] = network_features(student, time.block.heads, calib, time.rows)
        student.diagnostics = time.diagnostics()
        freeze(student)
        return quantized

    def learn_weights(self, job: Job, time: Temporal) -> None:
        """TIAR, then block reconstruction of what is left; with cm the block waits in full precision for its cache."""
        time.found["nearest"] = time.block.features(job.student, time.rows)
        cached = self.maintenance.kind == "cm"
        if cached:
            for item in members(job, time.block).values():
                item.layer.weight.data = item.weight.clone()
        elif self.tiar.timesteps != "none":
            device = time.rows["timestep"].device
            rows = time.rows if self.tiar.timesteps == "all" else distinct_rows(time.block, job.calib, None, device)
            reconstruct_block(job, time.block, rows)
        if cached or self.tiar.timesteps != "none":
            job.units = without(job.units, time.block.layers)
        reconstruct_weights(job)
        if not cached:
            time.found["reconstructed"] = time.block.features(job.student, time.rows)

    def quantize_activations(self, job: Job, time: Temporal, calib: CalibrationSet, bits: Bits) -> None:
        """Quantizers everywhere; running min-max ranges of all steps together, or with FSC of each step."""
        student, bypassed = job.student, time.block.layers if self.maintenance.kind == "cm" else []
        quantize_inputs({name: item for name, item in job.layers.items() if name not in bypassed}, self.act.signed)
        if self.attention:
            quantize_attention(student, bits, self.act.signed, signed_softmax=self.act.signed)
        if self.fsc.scope != "all":
            calibrate_static(student, calib, self.act, RunningMinMax)
        if self.fsc.scope != "none" and act_quantizers(student):
            per_step(student, time.steps, names=["*"] if self.fsc.scope == "all" else time.block.layers)
            if step_quantizers(student):
                calibrate_steps(student, calib, self.act, RunningMinMax)

    def cache(self, student: nn.Module, time: Temporal, calib: CalibrationSet, bits: Bits) -> None:
        """CM: cache all features. DS: those that a cache keeps better than the block does."""
        options, block = self.maintenance, time.block
        n_bits = bits.act if options.cache_bits is None else options.cache_bits
        full = [make_cache(exact, n_bits) for exact in time.exact]
        time.found["CM"] = [cache.values() for cache in full]
        if options.kind == "ds":
            time.found["TM"] = network_features(student, block.heads, calib, time.rows)
            tables = (error_table(time.found[kind], time.exact, options.metric) for kind in ("TM", "CM"))
            for cache, chosen in zip(full, choose_cached(*tables, options.granularity).T, strict=True):
                cache.use(chosen)
        for name, cache in zip(block.heads, full, strict=True):
            if cache.chosen.any():
                attach_cache(student.get_submodule(name), cache)
        attach_clock(student, time.steps)
        drop_unused(student, block.layers, block.heads)


def without(units: dict[str, list[str]], layers: Sequence[str]) -> dict[str, list[str]]:
    """Reconstruction units less these layers, and less what then is empty."""
    left = {unit: [name for name in names if name not in layers] for unit, names in units.items()}
    return {unit: names for unit, names in left.items() if names}
