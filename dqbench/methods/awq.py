"""AWQ: Activation-aware Weight Quantization (Lin et al. 2024, arXiv:2306.00978): scales, then round to nearest.

As in the release, a decoder layer's inputs are those of the full-precision network. Its search for clipped ranges is
not here; weight.estimator=mse chooses ranges by the weights alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits
from dqbench.methods.gptq import bake
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant.attach import freeze
from dqbench.quant.awq import check_points, scale_pairs
from dqbench.quant.functional import fake_quantize
from dqbench.quant.hessian import InputStatistics
from dqbench.quant.plan import Plan, select
from dqbench.quant.quantizers import Grid, WeightRule, column_spans, group_grid, spread
from dqbench.quant.sequential import (
    DecoderInputs,
    Passes,
    check_language_model,
    check_weights_only,
    inside,
    quantize_decoder,
    quantize_stages,
)


@dataclass
class AWQ:
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    compares: ClassVar[bool] = False  # a layer's inputs behind quantized ones with full precision's
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight} bits of its own
    weight: WeightRule
    points: int  # of the search, a = 0, 1/points, ...
    pairs: dict[str, list[str]]  # in a decoder layer: what takes 1 / s -> the layers that read it, and nothing else

    def __post_init__(self) -> None:
        check_points(self.points)

    def check_bits(self, bits: Bits) -> None:
        """Raise UserError for activation bits: the method is one of weights."""
        check_weights_only(self.name, bits, self.overrides)

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Decoder layer by decoder layer."""
        check_language_model(self.name, pipe, calib)
        self.check_bits(bits)
        quantized = clone(pipe)
        student = denoiser(quantized)
        student.plan = select(student, bits, self.skip, self.overrides, self.weight.granularity, self.weight.group_size)
        quantize = functools.partial(self.quantize_layer, plan=student.plan)
        quantize_decoder(student, anatomy(pipe).units, calib.batches(pipe.device), quantize)
        freeze(student)
        return quantized

    def quantize_layer(self, name: str, layer: nn.Module, inputs: DecoderInputs, plan: Plan) -> None:
        """One decoder layer, as sequential.quantize_layers() asks for it."""
        chosen = {inner: plan[f"{name}.{inner}"].weight for inner in inside(plan, name)}
        found: dict[str, InputStatistics] = {}
        quantize_stages(
            Passes(layer, inputs.student), list(chosen), lambda stage, own: found.update(dict.fromkeys(stage, own))
        )
        inputs.advance(layer, None)
        scale_pairs(layer, self.pairs, found, lambda inner, weight: self.nearest(weight, chosen[inner])[0], self.points)
        for inner, n_bits in chosen.items():
            linear = layer.get_submodule(inner)
            bake(linear, *self.nearest(linear.weight.float(), n_bits), self.weight.group_size)

    def nearest(self, weight: Tensor, n_bits: int) -> tuple[Tensor, Grid]:
        """`weight` [O, M] to nearest, and its grid, [R, G]."""
        spans = column_spans(weight.shape[1], self.weight.group_size, split=0)
        grid = group_grid(weight, spans, n_bits, self.weight)
        parts = (spread(values, spans) for values in (grid.scale, grid.zero_point))
        return fake_quantize(weight, *parts, grid.qmin, grid.qmax), grid
