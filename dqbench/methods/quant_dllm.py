"""Quant-dLLM: Post-Training Extreme Low-Bit Quantization for Diffusion Large Language Models (arXiv:2510.03274).

Weights as sums of binary planes with row and column scales (DAQ), the outliers of their importance weighted more (DOR),
planes shared out by importance (ABMP). Calibration rows are masked as in sampling (MCS, dqbench/text/mcs.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.errors import UserError, check_choice
from dqbench.models import anatomy, clone, denoiser
from dqbench.quant.attach import freeze
from dqbench.quant.block_bits import allocate
from dqbench.quant.compensation import Curvature, Damping, RoundedBlock, Span, block_error, compensate, spans_of
from dqbench.quant.hessian import InputStatistics
from dqbench.quant.multi_binary import Planes, Refinement, approximate, overhead_bits, store, widths_of
from dqbench.quant.packing import packed_bytes
from dqbench.quant.plan import LayerBits, Plan, select
from dqbench.quant.sequential import (
    DecoderInputs,
    check_language_model,
    check_weights_only,
    inside,
    quantize_decoder,
    quantize_decoder_layer,
)
from dqbench.quant.storage import stored_bits

COMPENSATIONS = ("none", "diagonal", "exact")
RULES = ("zscore", "smallest")


@dataclass
class Outliers:
    """DOR: which weights count more. Z = w^2 / U_jj^2 of a block is standardised; z: how far out an outlier is.

    zscore: |z| > threshold. smallest: Z at least that of the smallest outlier by that test. emphasis: E = lambda^2.
    """

    rule: str
    threshold: float
    emphasis: float

    def __post_init__(self) -> None:
        check_choice("outliers.rule", self.rule, RULES)
        if not (self.emphasis > 0 and self.threshold >= 0):
            given = f"outliers.emphasis={self.emphasis}, outliers.threshold={self.threshold}"
            raise UserError(f"{given}: out of range; allowed: more than 0 (1 for off), and 0 or more")

    def weights(self, importance: Tensor) -> Tensor | None:
        """E of blocks, from their Z [..., n, w]; None where it is 1."""
        if self.emphasis == 1:
            return None
        z = (importance - importance.mean(dim=(-2, -1), keepdim=True)) / importance.std(dim=(-2, -1), keepdim=True)
        chosen = z.abs() > self.threshold
        if self.rule == "smallest":
            outliers = importance.masked_fill(~chosen, torch.inf)
            chosen = importance >= outliers.amin(dim=(-2, -1), keepdim=True)
        return torch.where(chosen, self.emphasis, torch.ones((), device=importance.device))


@dataclass
class QuantDLLM:
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    name: str
    version: int
    skip: list[str]  # fnmatch patterns of layers kept in full precision
    overrides: dict[str, Any]  # pattern -> {weight} bits of its own
    block_size: int  # columns with row scales of their own
    abmp: float  # share of a weight's blocks that get a plane less, and of those that get one more
    daq: Refinement
    outliers: Outliers
    compensation: str  # what later blocks make up for: none | diagonal (release) | exact
    damping: Damping

    def __post_init__(self) -> None:
        check_choice("method.compensation", self.compensation, COMPENSATIONS)
        if self.block_size < 1:
            raise UserError(f"method.block_size={self.block_size} is out of range; allowed: 1 or more")
        if self.compensation == "none" and self.damping.asymmetry:
            raise UserError("damping.asymmetry has no effect with method.compensation=none; allowed with it: 0")

    def check_bits(self, bits: Bits) -> None:
        """Raise UserError for activation bits: the method is one of weights."""
        check_weights_only(self.name, bits, self.overrides)

    def plan(self, network: nn.Module, bits: Bits) -> Plan:
        """What is quantized and stored; `network` may be on the meta device."""
        self.check_bits(bits)
        plan = select(network, bits, self.skip, self.overrides)
        return {name: self.billed(network.get_submodule(name).weight.shape, own) for name, own in plan.items()}

    def billed(self, shape: torch.Size, own: LayerBits) -> LayerBits:
        """`own` with its scales, of 16 bits, as overhead."""
        if own.weight in OFF:
            return own
        overhead = overhead_bits(shape[0], widths_of(shape[1:].numel(), self.block_size), own.weight)
        return replace(own, weight_groups=0, weight_overhead_bits=overhead)

    @property
    def compares(self) -> bool:
        """Whether a layer's statistics take the full-precision network's inputs, too."""
        return self.damping.asymmetry > 0

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline, calib: CalibrationSet, bits: Bits) -> DiffusionPipeline:
        """Decoder layer by decoder layer; `calib` holds masked rows."""
        check_language_model(self.name, pipe, calib)
        quantized = clone(pipe)
        student = denoiser(quantized)
        student.plan = self.plan(student, bits)
        quantize = functools.partial(self.quantize_layer, plan=student.plan)
        quantize_decoder(student, anatomy(pipe).units, calib.batches(pipe.device), quantize, self.compares)
        freeze(student)
        return quantized

    def quantize_layer(self, name: str, layer: nn.Module, inputs: DecoderInputs, plan: Plan) -> None:
        """One decoder layer, as sequential.quantize_layers() asks for it; the plan gets what it really stores."""
        solve = functools.partial(self.solve, layer, plan, prefix=f"{name}.")
        quantize_decoder_layer(layer, inside(plan, name), inputs, solve)

    def solve(
        self, module: nn.Module, plan: Plan, names: Sequence[str], statistics: InputStatistics, prefix: str
    ) -> None:
        """Quantize the layers `names` of `module`, which share their input."""
        curvature = Curvature.of(*statistics.take(), self.damping)
        for name in names:
            layer, own = module.get_submodule(name), plan[prefix + name]
            blocks = self.approximate(layer.weight.detach().float(), own.weight, curvature)
            layer.weight_storage = store(blocks, layer.weight)
            values = torch.cat([planes.dequantize()[0] for planes in blocks], dim=1)
            layer.weight.data = values.to(layer.weight.dtype)
            overhead = stored_bits(layer.weight_storage) - 8 * packed_bytes(values.numel(), own.weight)
            plan[prefix + name] = replace(own, weight_groups=0, weight_overhead_bits=overhead)

    def approximate(self, weight: Tensor, order: int, curvature: Curvature) -> list[Planes]:
        """The blocks of a weight [O, M], from left to right, at `order` planes on average."""
        diagonal, spans = curvature.factor.diagonal(), spans_of(weight.shape[1], self.block_size)
        blocks = [weight[:, first:end] for first, end in spans]
        importance = [
            (block / diagonal[first:end]).square_() for block, (first, end) in zip(blocks, spans, strict=True)
        ]
        sums = [values.sum().item() for values in importance]
        orders = allocate(sums, [end - first for first, end in spans], order, self.abmp)
        if self.compensation == "none":
            return self.at_once(blocks, importance, orders)
        return self.in_turn(weight, spans, orders, curvature)

    def at_once(self, blocks: list[Tensor], importance: list[Tensor], orders: list[int]) -> list[Planes]:
        """Blocks that do not see each other: those of one shape and order in one batch."""
        found: dict[int, Planes] = {}
        for kind in {(order, block.shape[1]) for order, block in zip(orders, blocks, strict=True)}:
            alike = [g for g, order in enumerate(orders) if (order, blocks[g].shape[1]) == kind]
            emphasis = self.outliers.weights(torch.stack([importance[g] for g in alike]))
            planes = approximate(torch.stack([blocks[g] for g in alike]), kind[0], emphasis, self.daq)
            found |= dict(zip(alike, planes, strict=True))
        return [found[g] for g in range(len(blocks))]

    def in_turn(self, weight: Tensor, spans: list[Span], orders: list[int], curvature: Curvature) -> list[Planes]:
        """Blocks from left to right, each making up for those before it; importance is that of the moved weights."""
        found: list[Planes] = []

        def round_block(block: Tensor, span: Span) -> RoundedBlock:
            factor, seen = curvature.within(span).factor, block.clone()
            emphasis = self.outliers.weights((seen / factor.diagonal()).square_())
            emphasis = None if emphasis is None else emphasis.unsqueeze(0)
            found.append(approximate(seen.unsqueeze(0), orders[len(found)], emphasis, self.daq))
            values = found[-1].dequantize()[0]
            return RoundedBlock(values, block_error(seen, values, factor, self.compensation), seen)

        compensate(weight, curvature, spans, round_block)
        return found
