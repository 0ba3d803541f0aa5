"""One reconstruction iteration: ours as in a run, the plain one, and the limit, in both phases."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from bench.table import AT_LEAST, AT_MOST, Ratio, interleave, timed
from bench.units import CPU, Case, cases, network, quantize_activations
from dqbench.config import Recon, compose
from dqbench.quant.capture import first_tensor
from dqbench.quant.reconstruct import learn_rounding, learn_steps
from dqbench.quant.rows import Call
from tests.reference import module_swap as plain

FASTER, OF_LIMIT = 2.5, 1.6
QUICK_BLOCKS = ("down_blocks.2.resnets.1", "mid_block.resnets.0")
BLOCKS = (*QUICK_BLOCKS, "down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "up_blocks.1.resnets.0")
QUICK_UNITS = ("conv_in", "down_blocks.1.attentions.0", "mid_block.resnets.0", "up_blocks.1.resnets.0")


@dataclass
class Stamped(Call):
    """A recorded call that notes the CPU time at each mini-batch: iteration k lasts from stamp k to stamp k + 1."""

    stamps: list[float] = field(default_factory=list)

    def batch(self, rows: slice | np.ndarray, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        self.stamps.append(process_time())
        return super().batch(rows, device)


def settings(iters: int) -> Recon:
    """recon=fast with the regulariser on from the start, as in four fifths of a run's iterations."""
    recon: Recon = OmegaConf.to_object(compose(["recon=fast"]).recon)
    return replace(recon, iters=iters, iters_act=iters, warmup=0.0, dropout=False)


def rounding(recon: Recon) -> plain.Rounding:
    """The plain weight phase's view of the settings."""
    start = recon.warmup * recon.iters
    return plain.Rounding(recon.iters, recon.lr, recon.p, recon.penalty, start, tuple(recon.beta))


def weights_ours(case: Case) -> list[float]:
    """Seconds of each iteration but the last; the gather is part of it."""
    call = Stamped(case.call.rows, case.call.args, case.call.kwargs)
    learn_rounding(case.job, case.name, call, call)
    return np.diff(call.stamps).tolist()


def weights_plain(case: Case) -> list[float]:
    unit, layers = case.swapped()
    recon = case.job.recon
    return durations(
        case.plain_batches(recon.iters),
        lambda batches: plain.learn_rounding(unit, layers.values(), batches, rounding(recon)),
    )


def steps_ours(case: Case) -> list[float]:
    call = Stamped(case.call.rows, case.call.args, case.call.kwargs)
    learn_steps(case.job, case.name, call)
    return np.diff(call.stamps).tolist()


def steps_plain(case: Case) -> list[float]:
    unit, _ = case.swapped_with_steps()
    recon = case.job.recon
    return durations(
        case.plain_batches(recon.iters_act),
        lambda batches: plain.learn_steps(unit, batches, recon.iters_act, recon.lr_act, recon.p_act),
    )


def durations(batches: Iterable, learn: Any) -> list[float]:
    """Seconds of each iteration of `learn` but the last, from one request of a batch to the next."""
    stamps: list[float] = []

    def stamped() -> Iterator[tuple]:
        iterator = iter(batches)
        while True:
            stamps.append(process_time())
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch

    for _ in learn(stamped()):
        pass
    return np.diff(stamps).tolist()[:-1]


def limit(case: Case, repetitions: int) -> list[float]:
    """fp32 forward plus backward of the unit: all its parameters require gradients, its inputs do not; no optimizer."""
    unit = copy.deepcopy(case.teacher).requires_grad_(True)
    rows = slice(0, case.job.recon.batch_size)
    args, kwargs = case.call.batch(rows, CPU)
    slope = torch.ones_like(case.call.rows.read("output", rows, CPU))

    def step() -> None:
        unit.zero_grad()
        first_tensor(unit(*args, **kwargs)).backward(slope)

    return timed(step, repetitions)


def compare(model: str, names: Sequence[str], rounds: int, iters: int) -> dict[str, dict[str, dict[str, float]]]:
    """{phase: {unit: {ours, plain, limit}}}: median seconds."""
    times: dict[str, dict] = {"weight": {}, "activation": {}}
    recon, net = settings(iters + 1), network(model)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(net, names, recon, recon.batch_size, Path(folder)):
            contestants = {"limit": lambda case=case: limit(case, iters)}
            ours, theirs = (lambda case=case: weights_ours(case)), (lambda case=case: weights_plain(case))
            times["weight"][case.name] = interleave(rounds, ours=ours, plain=theirs, **contestants)
            quantize_activations(case)
            ours, theirs = (lambda case=case: steps_ours(case)), (lambda case=case: steps_plain(case))
            times["activation"][case.name] = interleave(rounds, ours=ours, plain=theirs, **contestants)
    return times


def ratios(model: str, times: dict[str, dict[str, dict[str, float]]]) -> list[Ratio]:
    """Of the sum over all units, per phase; for the large network each block is shown as well."""
    lines = []
    for phase, units in times.items():
        total: Counter = Counter()
        for seconds in units.values():
            total.update(seconds)
        lines += lines_of(f"{model}, {phase} phase, {len(units)} units", total, targets=True)
        if model != "digits_ddpm":
            for name, seconds in units.items():
                lines += lines_of(f"  {name}, {phase}", seconds, targets=False)
    return lines


def lines_of(what: str, seconds: dict[str, float], targets: bool) -> list[Ratio]:
    """plain / ours and ours / limit; what plain / limit leaves to be gained stands in the detail."""
    detail = ", ".join(f"{name} {seconds[name] * 1e3:.1f} ms" for name in ("ours", "plain", "limit"))
    faster, of_limit = seconds["plain"] / seconds["ours"], seconds["ours"] / seconds["limit"]
    return [
        Ratio(f"{what}: plain / ours", faster, AT_LEAST, FASTER if targets else None, detail),
        Ratio(f"{what}: ours / limit", of_limit, AT_MOST, OF_LIMIT if targets else None, ""),
    ]


def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """The ratios of both networks and the seconds of every unit."""
    times = {
        "digits_ddpm": compare("digits_ddpm", QUICK_UNITS if quick else (), rounds=2 if quick else 3, iters=10),
        "ddpm_cifar10": compare("ddpm_cifar10", QUICK_BLOCKS if quick else BLOCKS, rounds=2, iters=2 if quick else 3),
    }
    return [line for model, found in times.items() for line in ratios(model, found)], times
