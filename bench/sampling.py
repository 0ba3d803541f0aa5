"""One denoiser forward of the frozen w4a8 network against full precision: the overhead of fake quantization."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bench.table import AT_MOST, Ratio, interleave, timed
from bench.units import ACT, BITS, WEIGHT, Network, network
from dqbench.quant.attach import calibrating, freeze, prepare, quantize_attention, quantize_inputs
from dqbench.quant.plan import select, split
from dqbench.quant.shortcuts import skip_splits

TARGETS = {"digits_ddpm": 1.35, "ddpm_cifar10": 1.15}
BATCH = 64


@torch.no_grad()
def quantized(net: Network) -> nn.Module:
    """The network as qdiffusion leaves it, rounding to nearest in place of reconstruction."""
    student, calib = copy.deepcopy(net.unet), net.calibration(4)
    splits = skip_splits(student, calib.rows([0]), net.shortcuts)
    layers = prepare(student, split(select(student, BITS, [], {}), list(splits)), WEIGHT, splits)
    quantize_inputs(layers, signed=False)
    quantize_attention(student, BITS, signed=False, signed_softmax=False)
    with calibrating(student, ACT):
        student(**calib.rows(range(4)))
    return freeze(student)


@torch.no_grad()
def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Batch 64; the large network at batch 8 when quick."""
    lines, times = [], {}
    for name, target in TARGETS.items():
        large, net = name != "digits_ddpm", network(name)
        size = 8 if quick and large else BATCH
        student, batch = quantized(net), net.calibration(size).rows(range(size))
        turns = {
            kind: lambda model=model, batch=batch, n=1 if large else 5: timed(lambda: model(**batch), n)
            for kind, model in (("w4a8", student), ("fp32", net.unet))
        }
        seconds = interleave(2 if quick else 3 if large else 5, **turns)
        detail = ", ".join(f"{kind} {value * 1e3:.1f} ms" for kind, value in seconds.items())
        what, value = f"{name}, forward at batch {size}: w4a8 / fp32", seconds["w4a8"] / seconds["fp32"]
        lines.append(Ratio(what, value, AT_MOST, target, detail))
        times[name] = seconds
    return lines, times
