"""Activation ranges that run along the calibration set: static ones, and one per sampling step (TFMQ-DM's FSC)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet, kept_steps, named_generator
from dqbench.config import Calib
from dqbench.errors import UserError
from dqbench.progress import track
from dqbench.quant.attach import calibrating
from dqbench.quant.clock import StepClock, StepQuantizer, clock_of, held, step_quantizers
from dqbench.quant.functional import qrange
from dqbench.quant.quantizers import ActRule, Observer
from dqbench.quant.ranges import blend, choose_qparams, extremes

FIRST_ROWS = 64  # as many as initialise activation steps elsewhere (Q-Diffusion's release)


class RunningMinMax(Observer):
    """Running average of batch minima and maxima (TFMQ-DM's release): rule.momentum, started by rule.estimator.

    The first batch gives the ends of the grid that the estimator chooses for it; the range is widened to hold 0 only
    when (scale, zero_point) is made of it.
    """

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take one batch into account; scale and zero_point, shape []."""
        rows = x.detach().float().reshape(1, -1)
        self.range = self._start(rows) if self.range is None else blend(self.range, extremes(rows), self.rule.momentum)
        scale, zero_point = choose_qparams(
            torch.stack(self.range, dim=1), self.n_bits, estimator="minmax", official=False, **self.form
        )
        return scale.reshape(()), zero_point.reshape(())

    def _start(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self._choose(rows)
        qmin, qmax = qrange(self.n_bits, self.form["symmetric"])
        return (max(qmin, -qmax) if qmin else qmin) * scale - zero_point * scale, (qmax - zero_point) * scale


@torch.no_grad()
def calibrate_static(student: nn.Module, calib: CalibrationSet, rule: ActRule, observer: type[Observer]) -> None:
    """Choose all activation ranges from one pass over the whole set, its rows shuffled."""
    with calibrating(student, rule, observer=observer):
        observe(student, calib, np.arange(len(calib)), "ranges of all steps")


@torch.no_grad()
def calibrate_steps(
    student: nn.Module,
    calib: CalibrationSet,
    rule: ActRule,
    observer: type[Observer] = Observer,
    groups: Sequence[Sequence[int]] | None = None,
) -> None:
    """Choose all StepQuantizers' parameters, each step's from its own rows, in one pass over the set.

    groups: positions that share parameters, chosen from the rows of all of them; default: each on its own. Raises
    UserError for a group without rows.
    """
    clock, quantizers = clock_of(student), step_quantizers(student)
    groups = [[k] for k in range(len(clock.timesteps))] if groups is None else groups
    positions = positions_of(clock, calib, groups)
    for group in track(groups, "per-step ranges", len(groups)):
        for quantizer in quantizers:
            quantizer.calibrates(group[0])
        with held(clock, group[0]), calibrating(student, rule, only=StepQuantizer, observer=observer):
            rows = np.flatnonzero(np.isin(positions, group))
            observe(student, calib, rows, f"ranges of step {group[0]}", once=rule.over == "first")
        for quantizer in quantizers:
            quantizer.write(group, quantizer.scale[group[0]].clone(), quantizer.zero_point[group[0]].clone())


def check_steps(calib: Calib, steps: int, groups: Sequence[Sequence[int]]) -> None:
    """Raise UserError where the rows that `calib` picks of `steps` sampler steps leave a group without any."""
    if calib.policy != "uniform" or calib.source != "trajectory":
        given = f"calib.policy={calib.policy} with calib.source={calib.source}"
        raise UserError(f"per-step parameters need rows of every sampler step, not {given}; allowed: calib=every_step")
    kept = set(kept_steps(calib, steps).tolist())
    if missing := sum(kept.isdisjoint(group) for group in groups):
        given = f"calib.steps={calib.steps} leaves {missing} of {len(groups)} groups of the {steps} steps without rows"
        raise UserError(f"{given}; per-step parameters need calib=every_step")


def check_every_step(timesteps: Iterable[float], calib: CalibrationSet) -> None:
    """Raise UserError where calibrate_steps() would: a step of the sampler without rows, rows of another sampler."""
    clock = StepClock(timesteps, 1)
    positions_of(clock, calib, [[k] for k in range(len(clock.timesteps))])


def positions_of(clock: StepClock, calib: CalibrationSet, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The clock's position of each row [N]; UserError where none of the steps of a group has a row."""
    positions = np.array([clock.find(float(t)) for t in np.asarray(calib.inputs["timestep"])])
    there = set(positions.tolist())
    if missing := [group for group in groups if there.isdisjoint(group)]:
        first = f"timestep {clock.timesteps[missing[0][0]]:g}"
        steps = f"{sum(map(len, missing))} of the sampler's {len(clock.timesteps)} steps ({first}, ...)"
        raise UserError(f"the calibration set has no rows of {steps}; per-step parameters need calib=every_step")
    return positions


def observe(student: nn.Module, calib: CalibrationSet, rows: np.ndarray, name: str, once: bool = False) -> None:
    """Let `rows` pass the student in random order, calib.batch_size at a time; the first batch passes twice.

    It starts the ranges, then all follow (the release: 16 random rows, then the set in batches of 16). once: FIRST_ROWS
    of them as one batch, for rules that look at the first batch alone.
    """
    device = next(student.parameters()).device
    order = rows[torch.randperm(len(rows), generator=named_generator(name, calib.seed)).numpy()]
    if once:
        student(**calib.rows(order[:FIRST_ROWS], device))
        return
    batches = [order[first : first + calib.batch_size] for first in range(0, len(order), calib.batch_size)]
    for batch in [batches[0], *batches]:
        student(**calib.rows(batch, device))
