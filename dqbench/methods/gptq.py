"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al. 2023,
arXiv:2210.17323), on any network of linear layers and convolutions; damping.asymmetry > 0 makes it GPTAQ
(Li et al. 2025, arXiv:2504.02692). Activations, where bits.act asks for them, as in rtn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant import uniform
from dqbench.quant.attach import QuantLayer, calibrating, freeze, quantize_attention, quantize_inputs
from dqbench.quant.calls import NetworkCalls
from dqbench.quant.compensation import Curvature, Damping, RoundedBlock, Span, compensate, round_columns, spans_of
from dqbench.quant.functional import fake_quantize
from dqbench.quant.hessian import InputStatistics
from dqbench.quant.plan import Plan, select
from dqbench.quant.quantizers import ActRule, Grid, WeightRule, choose, column_spans, group_grid
from dqbench.quant.sequential import (
    DecoderInputs,
    Passes,
    inside,
    is_language_model,
    quantize_decoder,
    quantize_decoder_layer,
    quantize_stages,
)

LAZY = 128  # columns whose updates wait for each other where groups do not say


@dataclass
class GPTQ:
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight, act} bits of its own
    weight: WeightRule
    damping: Damping
    act_order: bool  # columns in the order of falling H_jj; the grid of every group is then that of the given weights
    act: ActRule
    attention: bool  # quantize the attention matmuls

    @property
    def compares(self) -> bool:
        """Whether a layer's statistics take the full-precision network's inputs, too."""
        return self.damping.asymmetry > 0

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Weights stage by stage, each seeing the stages before it quantized; then activation ranges."""
        quantized = clone(pipe)
        student = denoiser(quantized)
        student.plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        if is_language_model(calib):
            quantize = functools.partial(self.quantize_layer, plan=student.plan)
            quantize_decoder(student, anatomy(pipe).units, calib.batches(pipe.device), quantize, self.compares)
        else:
            self.quantize_network(student, denoiser(pipe), NetworkCalls(calib, pipe.device))
        self.quantize_activations(student, calib, bits)
        freeze(student)
        return quantized

    def quantize_layer(self, name: str, layer: nn.Module, inputs: DecoderInputs, plan: Plan) -> None:
        """One decoder layer, as sequential.quantize_layers() asks for it."""
        solve = functools.partial(self.solve, layer, plan, prefix=f"{name}.")
        quantize_decoder_layer(layer, inside(plan, name), inputs, solve)

    def quantize_network(self, student: nn.Module, teacher: nn.Module, calls: NetworkCalls) -> None:
        """A network as a whole: every stage sees the whole prefix quantized."""
        passes = Passes(student, calls, teacher, calls) if self.damping.asymmetry else Passes(student, calls)
        names = [name for name, own in student.plan.items() if own.weight not in OFF]
        quantize_stages(passes, names, functools.partial(self.solve, student, student.plan, prefix=""))

    def solve(
        self, module: nn.Module, plan: Plan, names: Sequence[str], statistics: InputStatistics, prefix: str
    ) -> None:
        """Round the layers `names` of `module`, which share their input, and keep how they are stored."""
        curvature, order = self.curvature(statistics)
        for name in names:
            layer, own = module.get_submodule(name), plan[prefix + name]
            weight = layer.weight.detach().flatten(1).float()
            bake(layer, *self.round_matrix(weight, own.weight, curvature, order), self.weight.group_size)

    def curvature(self, statistics: InputStatistics) -> tuple[Curvature, Tensor | slice]:
        """Of the columns in an order, and that order; the statistics are used up."""
        hessian, cross = statistics.take()
        if not self.act_order:
            return Curvature.of(hessian, cross, self.damping), slice(None)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, cross = (None if values is None else values[order][:, order] for values in (hessian, cross))
        return Curvature.of(hessian, cross, self.damping), order

    def round_matrix(
        self, weight: Tensor, n_bits: int, curvature: Curvature, order: Tensor | slice
    ) -> tuple[Tensor, Grid]:
        """(rounded [O, M], its grid, [R, G] as quantizers.group_grid() has it); curvature: of the columns in `order`.

        Groups of columns choose their grid when the ones before have been made up for; with act_order beforehand, so
        that a group is one of neighbouring columns as stored.
        """
        rule, (rows, count) = self.weight, weight.shape
        grid = group_grid(weight, column_spans(count, rule.group_size, split=0), n_bits, rule)
        group = torch.arange(count, device=weight.device)[order] // (rule.group_size or count)
        moving = rule.granularity == "per_group" and not self.act_order

        def round_block(block: Tensor, span: Span) -> RoundedBlock:
            own, grids = group[slice(*span)], (grid.scale, grid.zero_point)
            if moving:
                for values, chosen in zip(grids, choose(block, n_bits, rule), strict=True):
                    values[:, own[0]] = chosen
            columns = [values.expand(rows, -1)[:, own].T.contiguous() for values in grids]

            def round_column(column: Tensor, j: int) -> Tensor:
                return fake_quantize(column, columns[0][j], columns[1][j], grid.qmin, grid.qmax)

            return round_columns(block, curvature.within(span), round_column)

        spans = spans_of(count, rule.group_size if moving else LAZY)
        rounded = compensate(weight[:, order], curvature, spans, round_block)
        return rounded[:, order.argsort()] if self.act_order else rounded, grid

    def quantize_activations(self, student: nn.Module, calib: CalibrationSet, bits: Bits) -> None:
        """Ranges over the whole calibration set."""
        plan = student.plan.items()
        layers = {
            name: QuantLayer(layer := student.get_submodule(name), layer.weight, None, int(own.act), 0)
            for name, own in plan
        }
        quantize_inputs(layers, self.act.signed)
        if self.attention:
            quantize_attention(student, bits, self.act.signed, signed_softmax=False)
        if any(own.act not in OFF for _, own in plan) or not {bits.attention, bits.softmax} <= set(OFF):
            with calibrating(student, self.act):
                for batch in calib.batches(next(student.parameters()).device):
                    student(**batch)


def bake(layer: nn.Module, rounded: Tensor, grid: Grid, group_size: int | None) -> None:
    """Give `layer` the weight `rounded` [O, M], which lies on `grid` [R, G], and its storage."""
    layer.weight.data = rounded.reshape(layer.weight.shape).to(layer.weight.dtype).add_(0.0)  # codes know no -0
    layer.weight_storage = uniform.store_groups(layer.weight, grid, group_size, split=0)
