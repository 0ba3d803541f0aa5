"""Activation bits that change over the sampling steps, by given ranges of steps or by a rule (PTQD, Eq. 13-15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from diffusers import DiffusionPipeline

from dqbench.calibration import CalibrationSet
from dqbench.errors import UserError, check_choice
from dqbench.models import clone, denoiser
from dqbench.quant.attach import freeze
from dqbench.quant.clock import per_step
from dqbench.quant.plan import matches
from dqbench.quant.quantizers import ActRule
from dqbench.quant.running import calibrate_steps

MODES = ("none", "ranges", "rule")


@dataclass
class Range:
    """Sampler steps from `first` to before `last`, fractions of all steps: 0 is the noisiest step, 1 the end."""

    bits: int
    first: float
    last: float


@dataclass
class Mixed:
    """Step-aware activation bits: none, given ranges of steps, or by the rule SNR^Q > factor x SNR^F (Eq. 15)."""

    mode: str
    bits: list[int]  # candidates of the rule
    ranges: list[Range]
    factor: float

    def __post_init__(self) -> None:
        check_choice("method.mixed.mode", self.mode, MODES)
        widths = {"ranges": [own.bits for own in self.ranges], "rule": self.bits}.get(self.mode, [2])
        if not widths or not all(2 <= width <= 8 for width in widths):
            raise UserError(f"method.mixed: {self.mode} over bits {widths}; allowed: one or more widths from 2 to 8")
        if self.mode == "ranges":
            check_ranges(self.ranges)
        if self.mode == "rule" and not 0 < self.factor < float("inf"):
            raise UserError(f"method.mixed.factor={self.factor} is out of range; allowed: a number above 0")


def check_ranges(ranges: Sequence[Range]) -> None:
    """Raise UserError unless the ranges cover every step exactly once."""
    given = ", ".join(f"{own.first:g} to {own.last:g}" for own in ranges)
    ordered = sorted(ranges, key=lambda own: own.first)
    ends, starts = [0.0, *(own.last for own in ordered)], [*(own.first for own in ordered), 1.0]
    for end, start in zip(ends, starts, strict=True):
        if end != start:
            wrong = f"overlap from {start:g} to {end:g}" if end > start else f"leave {end:g} to {start:g} uncovered"
            line = (
                f"method.mixed.ranges {given} {wrong}; allowed: fractions from 0 (noisiest step) to 1, each step once"
            )
            raise UserError(line)
    if not all(own.first < own.last for own in ranges):
        raise UserError(f"method.mixed.ranges {given}: one covers no step; allowed: first below last")


def by_range(ranges: Sequence[Range], count: int) -> list[tuple[int, list[int]]]:
    """(bits, positions among `count` steps) of each range that has any."""
    spans = [(own.bits, list(range(round(own.first * count), round(own.last * count)))) for own in ranges]
    return [(bits, positions) for bits, positions in spans if positions]


def fewest_bits(signal_to_noise: dict[int, np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """[S]: the smallest key whose value is above `wanted` at that step; the largest where none is."""
    chosen = np.full(len(wanted), max(signal_to_noise))
    for width in sorted(signal_to_noise, reverse=True):
        chosen[signal_to_noise[width] > wanted] = width
    return chosen


def vary(
    quantized: DiffusionPipeline,
    steps: Sequence[float],
    groups: Sequence[tuple[int, list[int]]],
    calib: CalibrationSet,
    rule: ActRule,
    fixed: Sequence[str],
) -> DiffusionPipeline:
    """A copy whose layers have the activation bits of each group of steps, with ranges from the group's own rows.

    Weights, attention matmuls, layers in full precision and those that match `fixed` stay. Steps that the base learned
    give way to the ranges by `rule`. A repeated timestep goes by its first step.
    """
    result = clone(quantized)
    student = denoiser(result)
    varied = [name for name, own in student.plan.items() if own.act < 32 and not matches(name, fixed)]
    distinct = sorted(set(steps), reverse=True)
    width_at = {position: width for width, positions in groups for position in positions}
    firsts = [steps.index(t) for t in distinct]
    per_step(student, steps, [width_at[first] for first in firsts], varied)
    shared = [[k for k, first in enumerate(firsts) if first in positions] for _, positions in groups]
    calibrate_steps(student, calib, rule, groups=[positions for positions in shared if positions])
    mean = float(np.mean([width_at[position] for position in range(len(steps))]))
    student.plan |= {name: replace(own, act=mean) for name, own in student.plan.items() if name in varied}
    freeze(student)
    return result
