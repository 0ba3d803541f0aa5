"""How weights are quantized in two stages, as configured, and what is tried for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from dqbench.errors import UserError, check_choice
from dqbench.quant.plan import check_granularity
from dqbench.quant.residual import Codebook, StageOne, Zeros, check_percentiles, check_stage_1
from dqbench.quant.residual_weights import Layout, TwoStageWeight, expected_overhead, two_stage
from dqbench.quant.sparse_formats import FORMATS
from dqbench.quant.storage import Packed
from dqbench.quant.thresholds import Threshold


@dataclass
class Search:
    """What threshold.rule=calib tries: shares of survivors, on `rows` calibration inputs.

    budget: bits per weight that a layer's residual may add to what the layer stores without one, at any width.
    """

    grid: list[float]
    budget: float
    rows: int

    def __post_init__(self) -> None:
        if not self.grid or not all(0 <= rho <= 1 for rho in self.grid):
            raise UserError(f"method.weight.search.grid={self.grid}; allowed: one or more shares from 0 to 1")
        if not self.budget >= 0:
            raise UserError(f"method.weight.search.budget={self.budget} is out of range; allowed: 0 or more")
        if self.rows < 1:
            raise UserError(f"method.weight.search.rows={self.rows} is out of range; allowed: 1 or more")


@dataclass
class WeightTwoStage:
    """How weights are quantized. bits: of stage 1, null for bits.weight.

    percentiles: the share of a group that stage 1 does not clip; of several, each layer takes the one of the least
    squared error.
    """

    bits: int | None
    symmetric: bool
    granularity: str
    group_size: int | None
    percentiles: list[float]
    threshold: Threshold
    codebook: Codebook
    zeros: Zeros
    base_format: str
    format: str
    search: Search

    def __post_init__(self) -> None:
        check_stage_1("method.weight.bits", self.bits)
        check_granularity(self.granularity, self.group_size)
        if self.granularity == "per_tensor":
            raise UserError("method.weight.granularity=per_tensor; allowed: per_channel, per_group")
        if (self.granularity == "per_channel") != (self.group_size is None):
            raise UserError(f"group_size={self.group_size} does not go with granularity={self.granularity}")
        check_percentiles("method.weight.percentiles", self.percentiles)
        check_choice("method.weight.base_format", self.base_format, (*FORMATS, "auto"))
        check_choice("method.weight.format", self.format, (*FORMATS, "auto"))

    def quantize(self, weight: Tensor, n_bits: int, threshold: Threshold) -> TwoStageWeight:
        """weight [O, ...] in both stages."""
        flat = weight.detach().float().flatten(1)
        stages = self.stages(n_bits, flat.shape[1])
        tried = [two_stage(flat, stage, threshold, self.codebook, self.zeros) for stage in stages]
        return min(tried, key=lambda found: (found.dequantize() - flat).square().mean().item())

    def stages(self, n_bits: int, columns: int) -> list[StageOne]:
        """Stage 1 with each of the percentiles."""
        size = self.group_size or columns
        return [StageOne(n_bits, self.symmetric, percentile, size) for percentile in self.percentiles]

    def expected_overhead(self, shape: Sequence[int], n_bits: int) -> int:
        """Bits beside those of stage 1 that a weight [O, ...] will take, as far as its shape and the rules tell."""
        stage = self.stages(n_bits, prod(shape[1:]))[0]
        return expected_overhead(shape, stage, self.threshold, self.codebook)

    def store(self, found: TwoStageWeight, weight: Tensor) -> Packed:
        """As the configured formats store it."""
        return found.storage(weight, Layout(self.base_format, self.format))
