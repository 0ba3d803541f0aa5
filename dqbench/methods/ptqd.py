"""PTQD: Accurate Post-Training Quantization for Diffusion Models (He et al. 2023, arXiv:2305.10657).

On top of any other method: the statistics of its quantization noise correct the sampler, and activation
bits may change from step to step. Base quantization is a method of its own; base=release is the authors'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits, Calib, Sampler
from dqbench.correction import FORMS, Switches, check_correction, correct
from dqbench.diagnostics import curves as group
from dqbench.errors import UserError, check_choice
from dqbench.models import denoiser
from dqbench.noise_statistics import ESTIMATORS, Statistics, collect, curves, estimate, statistics_seeds
from dqbench.quant.clock import step_quantizers
from dqbench.quant.running import check_steps
from dqbench.quant.step_bits import Mixed, by_range, fewest_bits, vary
from dqbench.sampling import steps_of
from dqbench.stages import scratch

SMALLEST_P = 1e-6  # worth telling apart in a picture


@dataclass
class PTQD:
    name: str
    version: int
    base: Any  # the method whose quantized pipeline is refined and corrected
    mixed: Mixed
    chains: int  # full-precision chains along which statistics are collected
    estimator: str  # paper | official
    cnc: bool  # correlated noise correction
    bc: bool  # bias correction
    vsc: bool  # variance schedule calibration
    form: str  # of vsc: paper | official_master

    modalities = ("image",)

    def __post_init__(self) -> None:
        check_choice("method.estimator", self.estimator, ESTIMATORS)
        check_choice("method.form", self.form, FORMS)
        if self.chains < 1:
            raise UserError(f"method.chains={self.chains} is out of range; allowed: 1 or more")
        if self.base is None:
            raise UserError(f"method={self.name} builds on another method; give one as base=, e.g. base=qdiffusion")

    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Base, step-aware bits, statistics under the pipeline's own sampler, then the corrected scheduler."""
        quantized = self.refine(pipe, self.base(pipe, calib, bits), calib, bits)
        if self.correcting is None:
            return quantized
        return self.correct(quantized, self.statistics(pipe, quantized, calib.seed, "statistics"))

    @property
    def refining(self) -> dict[str, Any] | None:
        """What refine() depends on beside its arguments; None where it changes nothing."""
        if self.mixed.mode == "none":
            return None
        collected = {"chains": self.chains, "estimator": self.estimator, "cnc": self.cnc, "bc": self.bc}
        rule = {"bits": self.mixed.bits, "factor": self.mixed.factor, **collected}
        own = rule if self.mixed.mode == "rule" else {"ranges": [asdict(part) for part in self.mixed.ranges]}
        return {"ptqd": self.version, "mode": self.mixed.mode, **own}

    @property
    def correcting(self) -> dict[str, Any] | None:
        """What correct() depends on beside the statistics' sums; None where no switch is on."""
        if not (self.cnc or self.bc or self.vsc):
            return None
        return {"ptqd": self.version, "estimator": self.estimator, **asdict(self.switches)}

    @property
    def switches(self) -> Switches:
        """What is corrected."""
        return Switches(self.cnc, self.bc, self.vsc, self.form)

    def check(self, sampler: Sampler, scheduler: Any) -> None:
        """Raise UserError where the corrections have no meaning for the sampler's scheduler."""
        if self.correcting is None:
            return
        check_correction(scheduler, self.switches)
        if self.vsc and (operations := getattr(self.base, "operations", [])):
            given = f"base={self.base.name} with quantize_{operations[0]}=true"
            raise UserError(f"method.vsc=true has no formula for the steps of {given}; allowed: method.vsc=false")

    def check_bits(self, bits: Bits) -> None:
        """Raise UserError where activation bits cannot change over the steps."""
        if self.mixed.mode == "none":
            return
        stepwise = f"the per-step ranges of base={self.base.name}" if getattr(self.base, "stepwise", False) else None
        if given := stepwise or (f"bits.act={bits.act}" if bits.act in OFF else None):
            raise UserError(f"method.mixed.mode={self.mixed.mode} has no meaning with {given}; allowed: none")

    def check_calib(self, calib: Calib, sampler: Sampler, bits: Bits) -> None:
        """Raise UserError where steps whose activation bits are their own would have no calibration rows."""
        each = [[step] for step in range(sampler.steps)]
        given = [positions for _, positions in by_range(self.mixed.ranges, sampler.steps)]
        if groups := {"none": [], "ranges": given, "rule": each}[self.mixed.mode]:
            check_steps(calib, sampler.steps, groups)

    @property
    def fixed(self) -> list[str]:
        """Patterns of layers whose activation bits do not change over the steps: the base gives them their own."""
        return [pattern for pattern, own in self.base.overrides.items() if "act" in own]

    def refine(
        self, pipe: DiffusionPipeline, quantized: DiffusionPipeline, calib: CalibrationSet, bits: Bits
    ) -> DiffusionPipeline:
        """`quantized` with activation bits that change over the steps; itself where mixed.mode is none."""
        if self.mixed.mode == "none":
            return quantized
        self.check_bits(bits)
        if step_quantizers(denoiser(quantized)):
            given = f"the per-step ranges of base={self.base.name}"
            raise UserError(f"method.mixed.mode={self.mixed.mode} has no meaning with {given}; allowed: none")
        steps = steps_of(pipe).tolist()
        groups = by_range(self.mixed.ranges, len(steps)) if self.mixed.mode == "ranges" else None
        groups = groups or self.by_rule(pipe, quantized, calib)
        return vary(quantized, steps, groups, calib, self.base.act, self.fixed)

    def by_rule(
        self, pipe: DiffusionPipeline, quantized: DiffusionPipeline, calib: CalibrationSet
    ) -> list[tuple[int, list[int]]]:
        """(bits, step positions): at each step the fewest bits with SNR^Q > factor x SNR^F, else the most."""
        steps, signal_to_noise = steps_of(pipe).tolist(), {}
        for width in sorted(self.mixed.bits):
            candidate = vary(quantized, steps, [(width, list(range(len(steps))))], calib, self.base.act, self.fixed)
            statistics = self.statistics(pipe, candidate, calib.seed, f"statistics-{width}-bits")
            signal_to_noise[width] = statistics.signal_to_noise(self.cnc, self.bc)
        chosen = fewest_bits(signal_to_noise, self.mixed.factor * np.array(curves(statistics, pipe)["snr_forward"]))
        return [(width, np.flatnonzero(chosen == width).tolist()) for width in sorted(set(chosen.tolist()))]

    def statistics(self, pipe: DiffusionPipeline, quantized: DiffusionPipeline, seed: int, name: str) -> Statistics:
        """The noise model of `quantized` along full-precision sampling; within a stage, a killed collection goes on."""
        with workspace(name) as folder:
            collect(pipe, quantized, pipe.sampler, self.chains, lambda rows: statistics_seeds(rows, seed), folder)
            return estimate(folder, self.estimator)

    def correct(self, quantized: DiffusionPipeline, statistics: Statistics) -> DiffusionPipeline:
        """Give `quantized` the scheduler that the statistics correct."""
        sampler = getattr(quantized, "sampler", None)
        quantized.scheduler = correct(quantized.scheduler, statistics, self.switches, sampler)
        return quantized

    def curves(self, pipe: DiffusionPipeline, statistics: Statistics) -> dict[str, Any]:
        """The noise model and signal to noise over the steps, as groups of curves that a row keeps."""
        found = curves(statistics, pipe)
        t, p = found["timestep"], [None if p is None else max(p, SMALLEST_P) for p in found["p_normal"]]
        snr = {"SNR^F": "snr_forward", "SNR^Q": "snr_quantized", "SNR^Q corrected": "snr_corrected"}
        return {
            "quantization noise": group(t, {name: found[name] for name in ("k", "bias_rms", "std", "r2")}),
            "normality of the residual": group(t, {f"p, {SMALLEST_P} or more": p}, log=True),
            "signal to noise": group(t, {label: found[name] for label, name in snr.items()}, log=True),
        }


@contextmanager
def workspace(name: str) -> Iterator[Path]:
    """The stage's scratch folder `name`, kept after a kill; outside of a stage a temporary one."""
    if (folder := scratch(name)) is not None:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        yield Path(temporary)
