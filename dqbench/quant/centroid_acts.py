"""Activation quantizers with parameters per bin of time: a uniform grid, or 2^b centroids that lie on an 8-bit grid.

Ranges are percentiles of calibration batches, averaged exponentially, per bin. Centroids are the optimal ones for the
histogram of what calibration shows (1-D k-means by dynamic programming); stored as 8-bit codes, they index what an
integer matmul multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet, named_generator
from dqbench.errors import UserError, check_choice
from dqbench.quant.attach import attach_act_quantizer
from dqbench.quant.functional import fake_quantize, quantize
from dqbench.quant.kmeans import exact_each, midpoints
from dqbench.quant.quantizers import ActQuantizer, SplitQuantizer, union
from dqbench.quant.ranges import Pair, blend, extremes, percentile_range, range_qparams
from dqbench.quant.time_bins import Now, current

GRID_BITS = 8
AT_MOST = 2**20  # elements of one batch and bin that a percentile is taken of


@dataclass
class RangeRule:
    """How a range is found. percentile: in 50..100, of each batch; what lies beyond it on either side is clipped.

    over: how batches combine: ema, running average with `momentum`; all, the range that holds theirs.
    """

    percentile: float
    over: str
    momentum: float

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("ema", "all"))
        for key, (low, high) in {"percentile": (50, 100), "momentum": (0, 0.999)}.items():
            if not low <= getattr(self, key) <= high:
                raise UserError(f"method.act: {key}={getattr(self, key)} is out of range; allowed: {low} to {high}")

    def combine(self, running: Pair, new: Pair) -> Pair:
        """(low, high) after one more batch."""
        return blend(running, new, self.momentum) if self.over == "ema" else union(running, new)


@dataclass
class ActCentroids:
    """How activations are quantized."""

    bins: int  # of time, of equal mass over the calibration set; 1: the same parameters at all times
    uniform_from: int  # bits: from this width on grids are uniform
    centroids: RangeRule
    uniform: RangeRule

    def __post_init__(self) -> None:
        for key, (low, high) in {"bins": (1, 256), "uniform_from": (2, 9)}.items():
            if not low <= getattr(self, key) <= high:
                raise UserError(f"method.act.{key}={getattr(self, key)} is out of range; allowed: {low} to {high}")

    def table_bits(self, n_bits: float) -> int:
        """Stored bits of the centroids of a tensor at this width; none where its grid is uniform, or it has none."""
        return self.bins * GRID_BITS * 2 ** int(n_bits) if n_bits < self.uniform_from else 0


class BinnedQuantizer(ActQuantizer):
    """Fake quantization with scale and zero_point per bin (buffers [K]).

    centroids: buffer `levels`, uint8 [K, 2^b], ascending codes of an 8-bit grid, the nearest is taken. Else a uniform
    grid of n_bits.
    """

    def __init__(self, n_bits: int, bins: int, centroids: bool) -> None:
        super().__init__(GRID_BITS if centroids else n_bits, signed=False)
        self.grid_bits, self.n_bits, self.bins = self.n_bits, n_bits, bins
        self.scale, self.zero_point = torch.ones(bins), torch.zeros(bins)
        self.watch: Watch | None = None
        if centroids:
            self.register_buffer("levels", torch.arange(2**n_bits, dtype=torch.uint8).repeat(bins, 1))
            self.register_buffer("lookup", torch.zeros(bins, 2**GRID_BITS), persistent=False)
            self.register_load_state_dict_post_hook(_look_up)
            _look_up(self)

    @property
    def centroids(self) -> bool:
        return hasattr(self, "levels")

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ...], or [B k, ...] with k consecutive entries for each row. While watched, it passes as it is."""
        now = self.now(x)
        if self.watch is not None:
            for k, rows in by_bin(x.detach(), now):
                self.watch.see(self, k, rows)
            return x
        scale, zero_point = (per_row(values, x, now) for values in (self.scale, self.zero_point))
        if not self.centroids:
            return fake_quantize(x, scale, zero_point, self.qmin, self.qmax)
        codes = quantize(x, scale, zero_point, self.qmin, self.qmax)
        first = per_row(torch.arange(self.bins, device=x.device) * 2**GRID_BITS, x, now)
        return ((self.lookup.take((codes + first).long()) - zero_point) * scale).to(x.dtype)

    def now(self, x: Tensor) -> Now:
        """The bins of the running pass; one bin needs no clock."""
        return current() if self.bins > 1 else Now(torch.zeros(1, dtype=torch.long, device=x.device), (0,))

    def write(self, levels: Tensor) -> None:
        """Centroids of all bins, whole numbers [K, 2^b], ascending."""
        self.levels.copy_(levels)
        _look_up(self)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "binned", "n_bits": self.n_bits, "bins": self.bins, "centroids": self.centroids}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> BinnedQuantizer:
        """The module that spec() described."""
        return cls(spec["n_bits"], spec["bins"], spec["centroids"])

    def extra_repr(self) -> str:
        return f"bins={self.bins}, centroids={self.centroids}, {super().extra_repr()}"


@torch.no_grad()
def _look_up(quantizer: BinnedQuantizer, *_: Any) -> None:
    """Which level each code of the 8-bit grid goes to."""
    levels = quantizer.levels.float()
    codes = torch.arange(2**GRID_BITS, device=levels.device).float().expand(len(levels), -1).contiguous()
    quantizer.lookup = levels.gather(1, torch.searchsorted(midpoints(levels), codes))


def per_row(values: Tensor, x: Tensor, now: Now) -> Tensor:
    """Those of values [K] that the rows use, broadcastable to x."""
    chosen = values.index_select(0, now.index.to(values.device))
    return chosen if len(chosen) == 1 else spread(chosen, x)


def spread(values: Tensor, x: Tensor) -> Tensor:
    """values [B] -> [B k, 1, ...] for x [B k, ...]."""
    return values.repeat_interleave(len(x) // len(values)).reshape(-1, *[1] * (x.ndim - 1))


def by_bin(x: Tensor, now: Now) -> Iterator[tuple[int, Tensor]]:
    """(bin, its rows of x)."""
    if len(now.rows) == 1:
        yield now.rows[0], x
        return
    index = np.repeat(now.rows, len(x) // len(now.rows))
    for k in sorted(set(now.rows)):
        yield k, x[torch.from_numpy(np.flatnonzero(index == k)).to(x.device)]


class Watch:
    """What one pass over the calibration set finds out for one quantizer."""

    def see(self, quantizer: BinnedQuantizer, k: int, x: Tensor) -> None:
        """Take the rows x of bin k into account."""

    def finish(self, quantizer: BinnedQuantizer) -> None:
        """Write what was found; a bin without rows takes the nearest one's."""


class Ranges(Watch):
    """Percentiles of the batches, as the rules combine them."""

    def __init__(self, rule: ActCentroids) -> None:
        self.rule, self.found = rule, {}

    def see(self, quantizer: BinnedQuantizer, k: int, x: Tensor) -> None:
        rule = self.rule.centroids if quantizer.centroids else self.rule.uniform
        flat = x.float().reshape(1, -1)
        thin = flat[:, :: -(-flat.shape[1] // AT_MOST)]
        new = extremes(flat) if rule.percentile == 100 else percentile_range(thin, rule.percentile)
        self.found[k] = rule.combine(self.found.get(k, new), new)

    def finish(self, quantizer: BinnedQuantizer) -> None:
        for k in range(quantizer.bins) if self.found else ():
            low, high = self.found[closest(k, self.found)]
            scale, zero_point = range_qparams(low.clamp(max=0), high.clamp(min=0), quantizer.grid_bits)
            quantizer.scale[k], quantizer.zero_point[k] = scale[0], zero_point[0]


class Histograms(Watch):
    """How often each code of the 8-bit grid occurs, and the centroids that fit it best."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def see(self, quantizer: BinnedQuantizer, k: int, x: Tensor) -> None:
        codes = quantize(x, quantizer.scale[k], quantizer.zero_point[k], quantizer.qmin, quantizer.qmax)
        counts = torch.bincount(codes.flatten(), minlength=2**GRID_BITS)
        self.found[k] = self.found.get(k, 0) + counts

    def finish(self, quantizer: BinnedQuantizer) -> None:
        if not self.found:
            return
        counts = torch.stack([self.found[closest(k, self.found)] for k in range(quantizer.bins)]).double()
        grid = torch.arange(2**GRID_BITS, device=counts.device).double().expand_as(counts)
        quantizer.write(exact_each(grid, counts, 2**quantizer.n_bits).round())


def closest(k: int, found: Iterable[int]) -> int:
    """The nearest bin that calibration saw."""
    return min(found, key=lambda other: (abs(other - k), other))


def binned_quantizers(network: nn.Module) -> list[BinnedQuantizer]:
    """All of them below `network`."""
    return [module for module in network.modules() if isinstance(module, BinnedQuantizer)]


@contextmanager
def watching(quantizers: Sequence[BinnedQuantizer], make: Callable[[], Watch]) -> Iterator[None]:
    """Inside: the quantizers watch what passes. After: they have the parameters that fit it."""
    for quantizer in quantizers:
        quantizer.watch = make()
    try:
        yield
        for quantizer in quantizers:
            quantizer.watch.finish(quantizer)
    finally:
        for quantizer in quantizers:
            quantizer.watch = None


@torch.no_grad()
def calibrate(network: nn.Module, calib: CalibrationSet, rule: ActCentroids) -> None:
    """Choose ranges, then centroids, in a pass over the calibration set each; rows in random order."""
    everyone = binned_quantizers(network)
    with_centroids = [quantizer for quantizer in everyone if quantizer.centroids]
    for quantizers, make in ((everyone, lambda: Ranges(rule)), (with_centroids, Histograms)):
        if quantizers:
            with watching(quantizers, make):
                show(network, calib)


def show(network: nn.Module, calib: CalibrationSet) -> None:
    """Let all rows pass, shuffled so that every batch has all times."""
    order = torch.randperm(len(calib), generator=named_generator("activation ranges", calib.seed)).numpy()
    device = next(network.parameters()).device
    for first in range(0, len(order), calib.batch_size):
        network(**calib.rows(order[first : first + calib.batch_size], device))


def quantize_input(layer: nn.Module, n_bits: int, bins: int, centroids: bool, split: int) -> None:
    """Give a layer's input a quantizer; split > 0: channels before it and from it on have their own."""
    halves = [BinnedQuantizer(n_bits, bins, centroids) for _ in range(2 if split else 1)]
    quantizer = halves[0]
    if split:
        quantizer = SplitQuantizer(split, n_bits, signed=False)
        quantizer.first, quantizer.second = halves
    attach_act_quantizer(layer, quantizer, "input")


def table_bits(layer: nn.Module) -> int:
    """Stored bits of the centroids of a layer's activations."""
    if not hasattr(layer, "act_quantizer"):
        return 0
    return sum(GRID_BITS * own.levels.numel() for own in binned_quantizers(layer.act_quantizer) if own.centroids)
