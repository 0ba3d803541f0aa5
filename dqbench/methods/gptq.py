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
from dqbench.quant.compensation import Curvature, Damping, RoundedBlock, Span, compensate, round_columns, spans_of
from dqbench.quant.functional import fake_quantize
from dqbench.quant.hessian import InputStatistics
from dqbench.quant.plan import Plan, select
from dqbench.quant.quantizers import ActRule, Grid, WeightRule, choose, weight_grid
from dqbench.quant.sequential import (
    DecoderInputs,
    NetworkCalls,
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
        hessian, cross = statistics.hessian(), statistics.drift()
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian, cross = (None if values is None else values[order][:, order] for values in (hessian, cross))
        curvature = Curvature.of(hessian, cross, self.damping)
        for name in names:
            layer, own = module.get_submodule(name), plan[prefix + name]
            rounded, grid = self.round_matrix(layer.weight.detach().flatten(1).float(), own.weight, curvature, order)
            bake(layer, rounded, grid, self.weight)

    def round_matrix(self, weight: Tensor, n_bits: int, curvature: Curvature, order: Tensor) -> tuple[Tensor, Grid]:
        """(rounded, its grid), [O, M] each; curvature: of the columns in `order`.

        Groups of columns choose their grid when the ones before have been made up for; with act_order beforehand, so
        that a group is one of neighbouring columns as stored.
        """
        rule, grid = self.weight, weight_grid(weight, n_bits, self.weight)
        scale, zero_point = (values.expand_as(weight)[:, order] for values in (grid.scale, grid.zero_point))
        moving = rule.granularity == "per_group" and not self.act_order

        def round_block(block: Tensor, span: Span) -> RoundedBlock:
            first, end = span
            if moving:
                for values, chosen in zip((scale, zero_point), choose(block, n_bits, rule), strict=True):
                    values[:, first:end] = chosen.unsqueeze(1)
            columns = [values[:, first:end].T.contiguous() for values in (scale, zero_point)]

            def round_column(column: Tensor, j: int) -> Tensor:
                return fake_quantize(column, columns[0][j], columns[1][j], grid.qmin, grid.qmax)

            return round_columns(block, curvature.within(span), round_column)

        spans = spans_of(weight.shape[1], rule.group_size if moving else LAZY)
        rounded, back = compensate(weight[:, order], curvature, spans, round_block), order.argsort()
        return rounded[:, back], Grid(scale[:, back], zero_point[:, back], grid.qmin, grid.qmax)

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


def bake(layer: nn.Module, rounded: Tensor, grid: Grid, rule: WeightRule) -> None:
    """Give `layer` the weight `rounded` [O, M], which lies on `grid`, and its storage."""
    shape = layer.weight.shape
    layer.weight.data = rounded.reshape(shape).to(layer.weight.dtype) + 0.0  # codes know no -0
    whole = Grid(grid.scale.reshape(shape), grid.zero_point.reshape(shape), grid.qmin, grid.qmax)
    layer.weight_storage = uniform.store(layer.weight, whole, rule, split=0)
