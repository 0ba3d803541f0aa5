"""RT+ZS: residual truncation and zero suppression, as two-stage quantization with a thresholded sparse residual.

Stage 1 is a clipped uniform grid. Of what it misses, the few largest residuals are kept, in a few bits each and in the
smallest of six sparse formats (quant/residual.py, thresholds.py, sparse_formats.py). Activations take the same stages
as they pass (residual_acts.py). QuaRTZ (arXiv:2509.26436) suppresses leading zeros instead: methods/quartz.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.errors import UserError
from dqbench.models import clone, denoiser
from dqbench.quant.attach import attach_act_quantizer, calibrating, freeze, quantize_attention
from dqbench.quant.dynamic_attach import evenly
from dqbench.quant.packing import packed_bytes
from dqbench.quant.plan import LayerBits, Plan, select
from dqbench.quant.quantizers import ActRule
from dqbench.quant.residual_acts import PER_BATCH, ActTwoStage, Meter, TwoStageQuantizer, collecting, metering
from dqbench.quant.residual_report import Report, diagnostics
from dqbench.quant.residual_rules import WeightTwoStage
from dqbench.quant.sparse_compute import apply
from dqbench.quant.sparse_formats import entropy_bits
from dqbench.quant.storage import check_filled, stored_bits
from dqbench.quant.thresholds import expected_share


@dataclass
class RTZS:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightTwoStage
    act: ActTwoStage
    attention: bool  # quantize the attention matmuls, uniformly
    attention_act: ActRule

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights, then static ranges of activations over the whole calibration set, then what they would store."""
        quantized = clone(pipe)
        student = denoiser(quantized)
        student.plan = self.plan(student, bits)
        reports = {name: self.quantize_weight(student, name, calib) for name in list(student.plan)}
        self.quantize_inputs(student)
        if self.attention:
            quantize_attention(student, bits, self.attention_act.signed, signed_softmax=False)
        self.calibrate(student, calib)
        meters = self.measure(student, calib)
        student.diagnostics = diagnostics({name: found for name, found in reports.items() if found}, meters)
        freeze(student)
        return quantized

    def plan(self, network: nn.Module, bits: Bits) -> Plan:
        """What is quantized, and about what it stores before any value is known; `network` may be on the meta device.

        The plan of a quantized network has the measured bits.
        """
        plan = select(network, self.own_bits(bits), self.skip, self.overrides)
        check_filled(network, plan)
        return {name: self.expected(network.get_submodule(name).weight, own) for name, own in plan.items()}

    def expected(self, weight: Tensor, own: LayerBits) -> LayerBits:
        """`own` with the overhead to be expected."""
        changes: dict[str, float] = {"weight_groups": 0}
        if own.weight not in OFF:
            changes["weight_overhead_bits"] = self.weight.expected_overhead(weight.shape, own.weight)
        if own.act not in OFF:
            share = expected_share(self.act.threshold, PER_BATCH)  # of a large tensor: a plan knows no input's size
            changes["act_overhead_bits"] = entropy_bits(share, self.act.codebook.bits)
            changes["act_groups"] = 0 if self.act.dynamic else len(self.act.stored)
        return replace(own, **changes)

    def own_bits(self, bits: Bits) -> Bits:
        """`bits` with the widths of stage 1 that the method fixes for layers; what is off stays off."""
        fixed = {"weight": self.weight.bits, "act": self.act.bits}
        changes = {key: n for key, n in fixed.items() if n is not None and getattr(bits, key) not in OFF}
        return replace(bits, **changes)

    def quantize_weight(self, student: nn.Module, name: str, calib: CalibrationSet) -> Report | None:
        """Bake a layer's weight, keep its storage, and bill it; None where weights are off."""
        layer, own = student.get_submodule(name), student.plan[name]
        if own.weight in OFF:
            return None
        weight = layer.weight.detach()
        threshold = self.weight.threshold
        if threshold.rule == "calib":
            threshold = replace(threshold, value=self.search(student, name, calib))
        found = self.weight.quantize(weight, own.weight, threshold)
        layer.weight_storage = self.weight.store(found, weight.cpu())
        rounded = found.dequantize().reshape(weight.shape)
        error = (rounded - weight.float()).square().mean() / weight.float().square().mean().clamp(min=1e-30)
        layer.weight.data = rounded.to(weight.dtype)
        stored = stored_bits(layer.weight_storage)
        student.plan[name] = billed(own, stored, weight.numel())
        zeros, residual = ((values.float().mean().item()) for values in (found.codes == 0, found.support))
        return Report(error.item(), zeros, residual, stored / weight.numel())

    def search(self, student: nn.Module, name: str, calib: CalibrationSet) -> float:
        """The share of survivors whose output errs least on calibration rows, within the budget of bits per weight.

        Layers before it are quantized already. Where nothing fits the budget, the share of the fewest bits.
        """
        layer, search = student.get_submodule(name), self.weight.search
        tried = {rho: self.attempt(layer, student.plan[name].weight, rho) for rho in {0.0, *search.grid}}
        limit, errors = tried[0.0][0] + search.budget, dict.fromkeys(search.grid, 0.0)
        for batch in evenly(calib, search.rows).batches(layer.weight.device):
            x = seen_by(student, layer, batch)
            for rho in errors:
                errors[rho] += apply(layer, tried[rho][1], None, x).square().sum(dtype=torch.float64).item()
        return min((max(tried[rho][0], limit), error, rho) for rho, error in errors.items())[2]

    def attempt(self, layer: nn.Module, n_bits: int, rho: float) -> tuple[float, Tensor]:
        """(stored bits per weight, error of the weight, of its shape) where a share rho survives."""
        weight = layer.weight.detach()
        found = self.weight.quantize(weight, n_bits, replace(self.weight.threshold, value=rho))
        stored = stored_bits(self.weight.store(found, weight.cpu())) / weight.numel()
        return stored, found.dequantize().reshape(weight.shape).to(weight.dtype) - weight

    def quantize_inputs(self, student: nn.Module) -> None:
        """Attach a two-stage quantizer to the input of every planned layer."""
        for name, own in student.plan.items():
            if own.act not in OFF:
                attach_act_quantizer(student.get_submodule(name), TwoStageQuantizer(int(own.act), self.act), "input")

    def calibrate(self, student: nn.Module, calib: CalibrationSet) -> None:
        """Choose what is static: two-stage grids, and the uniform ones of attention."""
        quantizers = attached(student)
        with collecting(quantizers.values()), calibrating(student, self.attention_act):
            for batch in calib.batches(next(student.parameters()).device):
                student(**batch)

    def measure(self, student: nn.Module, calib: CalibrationSet) -> dict[str, Meter]:
        """What the activations of the calibration set would store, by layer; the plan is billed for it."""
        quantizers = attached(student)
        if not quantizers:
            return {}
        with metering(quantizers.values()) as meters:
            for batch in calib.batches(next(student.parameters()).device):
                student(**batch)
        found = dict(zip(quantizers, meters, strict=True))
        for name, meter in found.items():
            student.plan[name] = replace(student.plan[name], act_overhead_bits=meter.overhead_bits)
        return found


def attached(student: nn.Module) -> dict[str, TwoStageQuantizer]:
    """The two-stage quantizers by the layer they belong to."""
    found = {name: getattr(student.get_submodule(name), "act_quantizer", None) for name in student.plan}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def billed(own: LayerBits, stored: int, count: int) -> LayerBits:
    """The bill of a weight of `count` elements in `stored` bits: codes of stage 1, and in the overhead all the rest.

    Scales are part of the overhead, not groups: they have 16 bits and no zero point. Suppressed zeros make it smaller.
    """
    return replace(own, weight_groups=0, weight_overhead_bits=stored - 8 * packed_bytes(count, own.weight))


class _Seen(Exception):
    """Stops a forward pass at the layer whose input is wanted."""


def seen_by(student: nn.Module, layer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The input of `layer` in a forward pass of `batch`."""
    with _stopped_at(layer) as inputs, suppress(_Seen):
        student(**batch)
    if not inputs:
        raise UserError("threshold.rule=calib: a layer does not run in the forward pass; add it to method.skip")
    return inputs[0]


@contextmanager
def _stopped_at(layer: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: Sequence[Tensor]) -> None:
        inputs.append(args[0])
        raise _Seen

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield inputs
    finally:
        handle.remove()
