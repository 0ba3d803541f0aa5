"""Dynamic quantizers on a network: hung on layers and attention, billed, and calibrated where a part is static."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.quant.attach import attach_act_quantizer, calibrating, freeze, quantize_attention
from dqbench.quant.attention import attention_layers
from dqbench.quant.block_formats import BlockFormat
from dqbench.quant.block_weights import bake, overhead_bits
from dqbench.quant.dynamic import BlockQuantizer, LzsQuantizer
from dqbench.quant.plan import Plan, select
from dqbench.quant.quantizers import ActRule, act_quantizers
from dqbench.quant.storage import check_filled

Quantizer = LzsQuantizer | BlockQuantizer
Make = Callable[[int, int], Quantizer]  # (n_bits, axis of the channels) -> a quantizer


def plan_for(
    denoiser: nn.Module, bits: Bits, skip: Sequence[str], overrides: Mapping[str, Any], form: BlockFormat, make: Make
) -> Plan:
    """The plan of weights in `form` and of `make`'s activations, with what they really store. Works on the meta device.

    Scales lie in the overheads, at their own width: weight_groups counts none, act_groups the static ones.
    """
    plan, chosen = {}, select(denoiser, bits, skip, overrides)
    check_filled(denoiser, chosen)
    for name, own in chosen.items():
        layer, changes = denoiser.get_submodule(name), {}
        if own.weight not in OFF:
            changes |= {"weight_groups": 0, "weight_overhead_bits": overhead_bits(layer.weight.shape, form)}
        if own.act not in OFF:
            quantizer = make(int(own.act), axis_of(layer))
            overhead = quantizer.overhead_bits(channels_of(layer))
            changes |= {"act_groups": quantizer.scale.numel(), "act_overhead_bits": overhead}
        plan[name] = replace(own, **changes)
    return plan


def apply(student: nn.Module, plan: Plan, form: BlockFormat, make: Make) -> None:
    """Bake the planned weights in `form`; attach `make`'s quantizer to the input of every planned layer."""
    student.plan = plan
    for name, bits in plan.items():
        layer = student.get_submodule(name)
        if bits.weight not in OFF:
            bake(layer, form, bits.weight)
        if bits.act not in OFF:
            attach_act_quantizer(layer, make(int(bits.act), axis_of(layer)), "input")


def quantize_qkv(student: nn.Module, bits: Bits, make: Make) -> None:
    """Give attention `make`'s quantizers for q, k, v [B, L, C], and uniform unsigned ones for softmax outputs."""
    quantize_attention(student, bits, signed=False, signed_softmax=False)
    if bits.attention not in OFF:
        for attn in attention_layers(student).values():
            own = {part: make(bits.attention, -1).to(attn.to_q.weight.device) for part in ("q", "k", "v")}
            attn.processor.quantizers.update(own)


def axis_of(layer: nn.Module) -> int:
    """Where a layer's input has its channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def channels_of(layer: nn.Module) -> int:
    """How many channels a layer's input has."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def evenly(calib: CalibrationSet, rows: int) -> CalibrationSet:
    """`rows` rows of a calibration set, spread evenly over it, or all there are."""
    keep = np.zeros(len(calib), dtype=bool)
    keep[np.linspace(0, len(calib) - 1, min(rows, len(calib))).astype(int)] = True
    return calib.where(keep)


@torch.no_grad()
def finish(student: nn.Module, calib: CalibrationSet, rule: ActRule) -> None:
    """Choose what is static from the calibration set, scales by the extremes and softmax ranges by `rule`; freeze."""
    with observing(student) as static, calibrating(student, rule):
        if static or act_quantizers(student):
            for batch in calib.batches(next(student.parameters()).device):
                student(**batch)
    freeze(student)


@contextmanager
def observing(student: nn.Module) -> Iterator[list[Quantizer]]:
    """Inside: static scales follow what passes through; yields the quantizers that have one."""
    found = [module for module in student.modules() if isinstance(module, Quantizer) and module.static]
    for quantizer in found:
        quantizer.observed = True
    try:
        yield found
    finally:
        for quantizer in found:
            quantizer.observed = False
