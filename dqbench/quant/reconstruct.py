"""Block reconstruction: AdaRound weights unit by unit, then activation steps (BRECQ, as Q-Diffusion uses it).

Several processes draw the same mini-batches and take a part of each; a gradient is the whole mini-batch's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from dqbench import processes
from dqbench.calibration import CalibrationSet, named_generator, named_seed
from dqbench.config import Recon
from dqbench.progress import track
from dqbench.quant.adaround import AdaRound
from dqbench.quant.attach import QuantLayer, rounding
from dqbench.quant.capture import Recorder, disk_allows, first_tensor, trace_units
from dqbench.quant.checkpoints import Checkpoints
from dqbench.quant.learning import HALF, learning, widened
from dqbench.quant.quantizers import ActQuantizer, act_quantizers
from dqbench.quant.rows import Call
from dqbench.stages import scratch

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A reconstruction: the networks, their units -> quantized layers, the calibration set, the settings."""

    student: nn.Module
    teacher: nn.Module
    units: dict[str, list[str]]
    layers: dict[str, QuantLayer]
    calib: CalibrationSet
    recon: Recon
    official_order: Sequence[str]

    def order(self) -> list[str]:
        """The units' names in the order they are reconstructed."""
        if self.recon.order == "official" and self.official_order:
            return sorted(self.units, key=self._official_rank)
        return list(trace_units(self.student, list(self.units), self.calib))

    def _official_rank(self, name: str) -> int:
        ranks = (k for k, pattern in enumerate(self.official_order) if fnmatchcase(name, pattern))
        return next(ranks, len(self.official_order))


def reconstruct_weights(job: Job) -> None:
    """Learn the rounding of all units' weights. Resumes after the last unit that a killed run finished."""
    order = [name for name in job.order() if any(job.layers[key].grid is not None for key in job.units[name])]
    checkpoints = Checkpoints("weights")
    done = list(takewhile(lambda name: checkpoints.load(name, weights_of(job, name)), order))
    with recorders(job, order) as (teacher, student):
        teacher.remember_all(done)
        student.remember_all(done, as_stored=job.recon.asymmetric)
        for name in track(order[len(done) :], "reconstruct weights", len(order), len(done)):
            _reconstruct_weights_of(job, name, teacher, student)
            checkpoints.save(name, weights_of(job, name))


def weights_of(job: Job, name: str) -> dict[str, Tensor]:
    """The quantized layers' weights of a unit by layer name."""
    return {key: job.layers[key].layer.weight for key in job.units[name]}


def _reconstruct_weights_of(job: Job, name: str, teacher: Recorder, student: Recorder) -> None:
    with processes.common_folder(teacher.outputs.folder.parent) as folder:
        target = teacher.inputs(name, folder / "teacher", with_output=True)
        source = student.inputs(name, folder / "student") if job.recon.asymmetric else target
        learn_rounding(job, name, source, target)
        teacher.remember(name, target)
        student.remember(name, source)


def learn_rounding(job: Job, name: str, source: Call, target: Call) -> float:
    """The weight phase of one unit; returns the last mini-batch's reconstruction loss.

    Loss: mean over all but dim 1 of sum over dim 1 of |out - target|^p, plus penalty x sum of 1 - |2h - 1|^beta from
    warmup x iters on; beta falls linearly from beta[0] to beta[1] over the iterations after the warm-up.
    """
    recon, unit = job.recon, job.student.get_submodule(name)
    loss = torch.zeros(())
    members = [job.layers[key] for key in job.units[name]]
    with (
        learning(unit, recon, named_seed(f"dropout/{name}", job.calib.seed)),
        rounding(members, recon.split_penalty == "first") as rounders,
    ):
        optimizer = torch.optim.Adam([rounder.alpha for rounder in rounders], lr=recon.lr, fused=True)
        for count, batch in enumerate(mini_batches(job, name, source, target, recon.iters), start=1):
            set_beta(rounders, recon, count)
            loss = descend(unit, batch, optimizer, recon.p)
    return float(loss)


def descend(unit: nn.Module, batch: Part, optimizer: torch.optim.Optimizer, p: float) -> Tensor:
    """One step down the gradient of a mini-batch's reconstruction loss; returns the loss of this process's part."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    if len(batch.wanted):
        output = first_tensor(unit(*batch.args, **batch.kwargs))
        loss, slope = reconstruction_loss(output, batch.wanted, p)
        output.backward(slope)
    processes.average_gradients(optimizer.param_groups[0]["params"], batch.share)
    optimizer.step()
    return loss


def set_beta(rounders: Sequence[AdaRound], recon: Recon, count: int) -> None:
    """The regulariser's strength, and its exponent at iteration `count` (from 1): None, off, during the warm-up."""
    start, end = recon.warmup * recon.iters, recon.iters
    beta = None
    if count >= start:
        fraction = (count - start) / (end - start) if end > start else 1.0
        beta = recon.beta[1] + (recon.beta[0] - recon.beta[1]) * max(0.0, 1 - fraction)
    for rounder in rounders:
        rounder.beta, rounder.strength = beta, recon.penalty


def reconstruct_activations(job: Job) -> None:
    """Learn the activation steps of all units: full-precision inputs -> full-precision outputs, weights fixed."""
    order = [name for name in job.order() if act_quantizers(job.student.get_submodule(name))]
    checkpoints = Checkpoints("activations")
    done = list(takewhile(lambda name: checkpoints.load(name, steps_of(job.student.get_submodule(name))), order))
    with recorders(job, order) as (teacher, _):
        teacher.remember_all(done)
        for name in track(order[len(done) :], "reconstruct activations", len(order), len(done)):
            with processes.common_folder(teacher.outputs.folder.parent) as folder:
                call = teacher.inputs(name, folder, with_output=True)
                learn_steps(job, name, call)
                teacher.remember(name, call)
            checkpoints.save(name, steps_of(job.student.get_submodule(name)))


def learn_steps(job: Job, name: str, call: Call) -> None:
    """The activation phase of one unit: Adam with cosine annealing to 0 on the scales; zero points stay.

    The release's learning rate is absolute: small scales, as those of softmax outputs, can be driven through zero by a
    few iterations. `bound_steps` keeps every scale between half and twice its initial value; the release has no bound.
    """
    recon, unit = job.recon, job.student.get_submodule(name)
    if not recon.iters_act:
        return
    seed = named_seed(f"dropout/{name}", job.calib.seed)
    with learning(unit, recon, seed), learning_scales(act_quantizers(unit)) as scales:
        optimizer = torch.optim.Adam(scales, lr=recon.lr_act, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recon.iters_act)
        bounds = [(scale.detach() / 2, scale.detach() * 2) for scale in scales] if recon.bound_steps else []
        for batch in mini_batches(job, name, call, call, recon.iters_act):
            descend(unit, batch, optimizer, recon.p_act)
            schedule.step()
            for scale, (low, high) in zip(scales, bounds, strict=False):
                scale.data.clamp_(low, high)


@contextmanager
def learning_scales(quantizers: Sequence[ActQuantizer]) -> Iterator[list[nn.Parameter]]:
    """Inside: the quantizers' scales are parameters. After: buffers again, with what was learned, kept positive."""
    scales = []
    for quantizer in quantizers:
        scale = nn.Parameter(quantizer.scale.detach().clone())
        del quantizer.scale
        quantizer.scale = scale
        scales.append(scale)
    try:
        yield scales
    finally:
        for quantizer, scale in zip(quantizers, scales, strict=True):
            del quantizer.scale
            quantizer.register_buffer("scale", scale.detach().clamp(min=1e-8))


def steps_of(unit: nn.Module) -> dict[str, Tensor]:
    """The activation scales of a unit by name."""
    return {name: tensor for name, tensor in unit.named_buffers() if name.endswith("scale")}


@torch.no_grad()
def reconstruction_loss(output: Tensor, target: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """mean over all dims but dim 1 of sum over dim 1 of |output - target|^p, and its derivative by output. p > 1."""
    error = output - target
    power = error
    if p != 2:  # |e|^(p-2) e; exp(p log) takes a fifth of pow's time, but log(0) is slow
        power = (error * error).add_(1e-30).log_().mul_(p / 2 - 1).exp_().mul_(error)
    share = output.shape[1] / output.numel()
    loss = torch.dot(error.reshape(-1), power.reshape(-1)) * share
    return loss, power.mul_(p * share)


@dataclass(frozen=True)
class Part:
    """This process's rows of a mini-batch: the unit's arguments, what it should return, their share of the rows."""

    args: Sequence[Any]
    kwargs: dict[str, Any]
    wanted: Tensor
    share: float


def mini_batches(job: Job, name: str, source: Call, target: Call, iters: int) -> Iterator[Part]:
    """A fresh random choice of rows for each iteration, drawn from the unit's own generator.

    Dropout draws masks for a whole mini-batch: there every process takes all of it.
    """
    unit, device = job.student.get_submodule(name), next(job.student.parameters()).device
    generator = named_generator(f"reconstruct/{name}", job.calib.seed)
    size = min(job.recon.batch_size, len(job.calib))
    half = any(dtype in HALF for call in (source, target) for dtype in call.rows.dtypes.values())
    whole = job.recon.dropout and any(isinstance(part, nn.Dropout) and part.p for part in unit.modules())
    for _ in range(iters):
        rows = torch.randperm(len(job.calib), generator=generator)[:size]
        own = rows if whole else processes.split(rows)
        share = 1 / processes.count() if whole else len(own) / size
        batch = (*source.batch(own.numpy(), device), target.rows.read("output", own.numpy(), device))
        yield Part(*(widened(batch) if half else batch), share)


@contextmanager
def recorders(job: Job, order: Sequence[str]) -> Iterator[tuple[Recorder, Recorder]]:
    """(teacher, student) recorders on temporary files; outputs are kept for replay where order and disk allow."""
    with processes.common_folder(scratch("activations-on-disk")) as folder:
        bytes_needed = 2 * len(job.calib) * sum(trace_units(job.teacher, order, job.calib).values())
        allowed = processes.agreed(lambda: disk_allows(folder, bytes_needed))
        replay = job.recon.order == "execution" and allowed
        log.debug("unit outputs take %.2f GB on disk; kept for replay: %s", bytes_needed / 1e9, replay)
        yield tuple(
            Recorder(model, job.calib, folder / name, replay)
            for name, model in (("teacher", job.teacher), ("student", job.student))
        )
