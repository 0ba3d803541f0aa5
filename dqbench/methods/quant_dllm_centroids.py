"""Quant-dLLM with learned centroids: the variant in which groups of weights share a codebook (not the published one).

Non-uniform weights and activations, parameters per bin of diffusion time, cross-layer equalization, layer
reconstruction in execution order, bias correction that looks ahead, and bit-widths from sensitivities under an exact
budget. It serves masked-diffusion language models and image models alike; Quant-dLLM as published (arXiv:2510.03274)
approximates weights by binary planes instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.errors import UserError
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant.attach import find_units, freeze, prepare, quantize_attention
from dqbench.quant.attention import attention_layers
from dqbench.quant.bias_correction import BiasRule, correct
from dqbench.quant.centroid_acts import ActCentroids, BinnedQuantizer, calibrate, quantize_input, table_bits
from dqbench.quant.centroid_recon import Moments, WeightCentroids, is_plain
from dqbench.quant.codebook import Codebook
from dqbench.quant.equalize import equalize
from dqbench.quant.layerwise import RowBins, Visit, spread_rows, visits
from dqbench.quant.plan import LayerBits, Plan, matches, select
from dqbench.quant.quantizers import WeightRule
from dqbench.quant.sensitivity import MixedBits
from dqbench.quant.shortcuts import skip_splits
from dqbench.quant.time_bins import attach_bins, bins_of, choose_edges, telling

SENSITIVE_BITS = 8


@dataclass
class QuantDLLMCentroids:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    sensitive: list[str]  # patterns of layers whose inputs have 8 bits at least
    equalize: bool
    mixed: MixedBits
    weight: WeightCentroids
    uniform: WeightRule  # of weights from weight.uniform_from bits on
    rows: int  # calibration rows that layers are reconstructed on
    bias: BiasRule
    act: ActCentroids
    attention: bool  # quantize the attention matmuls
    split: bool  # inputs that are skip concatenations in two halves, as Q-Diffusion (arXiv:2302.04304) does

    def __post_init__(self) -> None:
        if self.bias.per_bin and self.act.bins == 1:
            raise UserError("method.bias.per_bin has no effect with method.act.bins=1; allowed: 2 or more bins")

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights layer by layer with activations in full precision, then activations with weights fixed."""
        quantized = clone(pipe)
        student, family = denoiser(quantized), anatomy(pipe)
        student.plan = self.plan(student, bits)
        edges = self.edges(student, calib, bits)
        shortcuts = family.shortcuts if self.split else []
        splits = skip_splits(student, calib.rows([0], pipe.device), shortcuts) if shortcuts else {}
        if any(own.weight not in OFF for own in student.plan.values()):
            teacher = self.balance(student, denoiser(pipe))
            self.allocate(student, teacher, calib, bits)
            self.quantize_weights(student, teacher, family.units, splits, spread_rows(calib, self.rows), edges)
        self.quantize_inputs(student, calib, bits, splits, edges)
        freeze(student)
        return quantized

    def plan(self, network: nn.Module, bits: Bits) -> Plan:
        """What is quantized and stored; `network` may be on the meta device. Mixed widths are known after calibration.

        Shortcut convs, which have activation parameters twice, are billed once here.
        """
        plan = select(network, bits, self.skip, self.overrides)
        return {name: self.planned(network, name, own) for name, own in plan.items()}

    def planned(self, network: nn.Module, name: str, own: LayerBits) -> LayerBits:
        """`own` with the widths that are used, and the overhead that goes with them."""
        layer, act = network.get_submodule(name), own.act
        if act not in OFF and matches(name, self.sensitive):
            act = max(act, SENSITIVE_BITS)
        own = replace(own, act=act, act_groups=self.act.bins, act_table_bits=self.act.table_bits(act))
        if own.weight in OFF:
            return own
        own = replace(own, added_bias=self.bias.added(layer, self.act.bins))
        if own.weight >= self.weight.uniform_from:
            return own
        overhead = self.weight.overhead_bits(layer.weight.shape, own.weight)
        return replace(own, weight_groups=0, weight_overhead_bits=overhead)

    def edges(self, student: nn.Module, calib: CalibrationSet, bits: Bits) -> list[float]:
        """Between the bins of time; none where nothing depends on the time."""
        acts = any(own.act not in OFF for own in student.plan.values()) or self.quantizes_attention(bits)
        biases = self.bias.per_bin and any(own.added_bias for own in student.plan.values())
        return choose_edges(student, calib, self.act.bins) if acts or biases else []

    def balance(self, student: nn.Module, original: nn.Module) -> nn.Module:
        """The full-precision network that the student is compared with: its own twin, once it is equalized."""
        kept = [student.get_submodule(name) for name, own in student.plan.items() if own.weight in OFF]
        return copy.deepcopy(student) if self.equalize and equalize(student, kept) else original

    def allocate(self, student: nn.Module, teacher: nn.Module, calib: CalibrationSet, bits: Bits) -> None:
        """Mixed widths, where asked for, for the layers that have bits.weight; overrides stay."""
        if self.mixed.method == "none" or bits.weight in OFF:
            return
        free = {name: own for name, own in student.plan.items() if own.weight == bits.weight}
        widths = self.mixed.choose(teacher, list(free), bits.weight, self.weight, spread_rows(calib, self.mixed.rows))
        for name, width in widths.items():
            groups = len(teacher.get_submodule(name).weight)
            own = replace(free[name], weight=width, weight_groups=groups, weight_overhead_bits=0)
            student.plan[name] = self.planned(teacher, name, own)

    def quantize_weights(
        self,
        student: nn.Module,
        teacher: nn.Module,
        units: list[str],
        splits: Mapping[str, int],
        rows: CalibrationSet,
        edges: list[float],
    ) -> None:
        """Reconstruct and bias-correct every layer in turn; those that never run are rounded as they are."""
        plan = {name: replace(own, added_bias=0) for name, own in student.plan.items()}
        chosen = {name: own for name, own in plan.items() if own.weight not in OFF}
        uniform = {name: own for name, own in chosen.items() if own.weight >= self.weight.uniform_from}
        prepare(student, uniform, self.uniform, splits)
        student.plan, left = plan, set(chosen)
        per_bin = edges if self.bias.per_bin else []
        bins = RowBins(bins_of(student, rows, per_bin), len(per_bin) + 1) if per_bin else None
        with telling(student, per_bin):
            for visit in visits(student, teacher, find_units(student, units, chosen), rows, bins):
                left.discard(name := visit.name)
                book = None if name in uniform else self.reconstruct(visit, plan[name].weight, splits.get(name, 0))
                plan[name] = replace(plan[name], added_bias=correct(visit, self.bias, book))
        for name in left - set(uniform):
            self.weight.bake(student.get_submodule(name), plan[name].weight, splits.get(name, 0), None)

    def reconstruct(self, visit: Visit, n_bits: int, split: int) -> Codebook:
        """Give a layer the weight whose outputs come nearest to full precision's."""
        return self.weight.bake(visit.layer, n_bits, split, self.moments(visit))

    def moments(self, visit: Visit) -> Moments | None:
        """Of the layer's inputs and wanted outputs; None for grouped convs, whose outputs see some of the inputs."""
        if not is_plain(visit.layer):
            return None
        found = Moments.zeros(visit.layer)
        for x, y in visit.pairs():
            found.add(visit.exact, x, y)
        return found

    def quantize_inputs(
        self, student: nn.Module, calib: CalibrationSet, bits: Bits, splits: Mapping[str, int], edges: list[float]
    ) -> None:
        """Attach activation quantizers and the clock of their bins; calibrate; bill their tables."""
        chosen = {name: int(own.act) for name, own in student.plan.items() if own.act not in OFF}
        for name, width in chosen.items():
            centroids = width < self.act.uniform_from
            quantize_input(student.get_submodule(name), width, len(edges) + 1, centroids, splits.get(name, 0))
        if self.attention:
            self.quantize_attention(student, bits, len(edges) + 1)
        if edges:
            attach_bins(student, edges)
        calibrate(student, calib, self.act)
        for name, own in student.plan.items():
            student.plan[name] = replace(own, act_table_bits=table_bits(student.get_submodule(name)))

    def quantizes_attention(self, bits: Bits) -> bool:
        """Whether q, k, v have parameters."""
        return self.attention and bits.attention not in OFF

    def quantize_attention(self, student: nn.Module, bits: Bits, bins: int) -> None:
        """q, k, v uniform per bin; softmax outputs on [0, 1]."""
        quantize_attention(student, bits, signed=False, signed_softmax=False)
        for attn in attention_layers(student).values():
            quantizers = getattr(attn.processor, "quantizers", {})
            for part, old in list(quantizers.items()):
                if part == "softmax":
                    old.scale.fill_(1 / old.qmax)
                else:
                    quantizers[part] = BinnedQuantizer(old.n_bits, bins, centroids=False).to(old.scale.device)
