"""What methods that look at the sampling step cost: per-step activation parameters, noise statistics."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf

from bench.sampling import BATCH, quantized
from bench.table import AT_MOST, Ratio, interleave, timed
from bench.units import Network, network
from dqbench.config import Sampler, compose
from dqbench.models import clone, denoiser, load
from dqbench.noise_statistics import collect
from dqbench.quant.clock import per_step
from dqbench.sampling import generate, set_sampler

NAMES = ("digits_ddpm", "ddpm_cifar10")


@torch.no_grad()
def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Per-step over static parameters in one forward, both networks; statistics over the two passes they stand for."""
    lines, times = [], {}
    for name in NAMES[:1] if quick else NAMES:
        line, times[name] = parameters(network(name), name, quick)
        lines.append(line)
    line, times["statistics"] = statistics(quick)
    return [*lines, line], times


def parameters(net: Network, name: str, quick: bool) -> tuple[Ratio, dict]:
    """A w4a8 forward with one scale and zero point for each of 50 steps, against one for all."""
    static = quantized(net)
    stepwise = copy.deepcopy(static)
    size, large = (8 if quick else BATCH), name != "digits_ddpm"
    timesteps = torch.arange(980, -1, -20)
    per_step(stepwise, timesteps.tolist())
    batch = net.calibration(size).rows(range(size)) | {"timestep": torch.tensor(500)}
    turns = {
        kind: lambda model=model: timed(lambda: model(**batch), 1 if large else 20)
        for kind, model in (("per step", stepwise), ("static", static))
    }
    seconds = interleave(3 if large else 10, **turns)
    detail = ", ".join(f"{kind} {value * 1e3:.1f} ms" for kind, value in seconds.items())
    what = f"{name}, w4a8 forward at batch {size}: per-step / static"
    return Ratio(what, seconds["per step"] / seconds["static"], AT_MOST, 1.03, detail), seconds


def statistics(quick: bool) -> tuple[Ratio, dict]:
    """PTQD's statistics of 64 chains, against sampling as many in full precision and as many quantized."""
    cfg = compose(["sampler.steps=4" if quick else "sampler.steps=20"])
    sampler: Sampler = OmegaConf.to_object(cfg.sampler)
    pipe = set_sampler(load(OmegaConf.to_object(cfg.model)), sampler)
    student = clone(pipe)
    student.unet = quantized(Network(denoiser(pipe), cfg.model.units, cfg.model.shortcuts))
    chains = list(range(BATCH))

    def collected() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(pipe, student, sampler, BATCH, lambda rows: list(rows), Path(folder))

    seconds = interleave(
        2 if quick else 5,
        statistics=lambda: timed(collected),
        fp32=lambda: timed(lambda: generate(pipe, sampler, chains)),
        w4a8=lambda: timed(lambda: generate(student, sampler, chains)),
    )
    value = seconds["statistics"] / (seconds["fp32"] + seconds["w4a8"])
    detail = ", ".join(f"{kind} {one:.2f} s" for kind, one in seconds.items())
    what = f"digits_ddpm, {sampler.steps} steps: noise statistics / (fp32 + w4a8 sampling)"
    return Ratio(what, value, AT_MOST, 1.2, detail), seconds
