"""Cached temporal features (Temporal Feature Matters, arXiv:2407.19547): a table in place of the layers that make them.

The paper's release does not contain this; what is cached and how it is quantized is our reading of its abstract.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.config import OFF
from dqbench.quant.clock import StepClock, per_row
from dqbench.quant.functional import dequantize, qrange, quantize
from dqbench.quant.plan import LayerBits
from dqbench.quant.ranges import choose_qparams


class FeatureCache(nn.Module):
    """What one layer returns at each of S timesteps: codes [S, C], scale and zero_point [S, 1]; chosen [S]: in use.

    n_bits of 16 or 32: codes are the features themselves. complete: the layer never runs.
    """

    def __init__(self, shape: Sequence[int], n_bits: int, complete: bool) -> None:
        super().__init__()
        self.n_bits, self.complete = n_bits, complete
        self.register_buffer("codes", torch.zeros(*shape, dtype=torch.float32 if n_bits in OFF else torch.uint8))
        self.register_buffer("scale", torch.ones(shape[0], 1))
        self.register_buffer("zero_point", torch.zeros(shape[0], 1))
        self.register_buffer("chosen", torch.ones(shape[0], dtype=torch.bool))
        self.clock: StepClock | None = None

    def use(self, chosen: Tensor) -> None:
        """Serve only the timesteps that are chosen, [S]; at others the layer runs."""
        self.chosen.copy_(chosen)
        self.complete = bool(chosen.all())

    def values(self) -> Tensor:
        """All features, [S, C]."""
        return dequantize(self.codes, self.scale, self.zero_point)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, C], whether they are in use [B, 1]) where the clock points; x: the layer's input, [B, ...]."""
        index = self.clock.index
        codes, scale, zero_point = (table.index_select(0, index) for table in (self.codes, self.scale, self.zero_point))
        rows = dequantize(codes, scale, zero_point).to(x.dtype)
        chosen = per_row(self.chosen.index_select(0, index), x)
        return rows.repeat_interleave(len(x) // len(index), dim=0), chosen

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"shape": list(self.codes.shape), "n_bits": self.n_bits, "complete": self.complete}

    def overhead_bits(self) -> int:
        """Bits stored for the timesteps in use: codes, one scale and zero point each; and which they are."""
        steps, channels = self.codes.shape
        qparams = 0 if self.n_bits in OFF else 32 + self.n_bits
        return int(self.chosen.sum()) * (channels * self.n_bits + qparams) + (0 if self.complete else steps)


def make_cache(features: Tensor, n_bits: int) -> FeatureCache:
    """The cache of features [S, C], min-max per timestep."""
    cache = FeatureCache(features.shape, n_bits, complete=True).to(features.device)
    if n_bits in OFF:
        cache.codes.copy_(features)
        return cache
    scale, zero_point = choose_qparams(features.float(), n_bits, estimator="minmax")
    cache.scale.copy_(scale.unsqueeze(1))
    cache.zero_point.copy_(zero_point.unsqueeze(1))
    cache.codes.copy_(quantize(features.float(), cache.scale, cache.zero_point, *qrange(n_bits, False)))
    return cache


def attach_cache(layer: nn.Module, cache: FeatureCache) -> None:
    """Let `layer` return cached features; its type and its weights' names stay. The denoiser's clock comes later."""
    layer.feature_cache = cache.to(layer.weight.device)
    layer.forward = functools.partial(_cached, layer)


def _cached(layer: nn.Module, x: Tensor) -> Tensor:
    features, chosen = layer.feature_cache(x)
    if layer.feature_cache.complete:
        return features
    return torch.where(chosen, features, type(layer).forward(layer, x))


def caches_of(model: nn.Module) -> dict[str, FeatureCache]:
    """Layer name -> its cache."""
    return {name: layer.feature_cache for name, layer in model.named_modules() if hasattr(layer, "feature_cache")}


def drop_unused(model: nn.Module, layers: Sequence[str], heads: Sequence[str]) -> None:
    """Zero the weights that nothing reads any more, and plan them as such; a cache is billed with its layer.

    layers: the temporal block's. Those that are no heads lead to all heads: unused once every head has all features.
    """
    caches, plan = caches_of(model), model.plan
    complete = {name for name, cache in caches.items() if cache.complete}
    unused = set(layers) if complete >= set(heads) else complete
    for name in layers:
        overhead = caches[name].overhead_bits() if name in caches else 0
        if name in unused:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.data.zero_()
            plan[name] = LayerBits(weight=0, act=0, weight_groups=0, act_groups=0, weight_overhead_bits=overhead)
        elif name in plan:
            plan[name] = replace(plan[name], weight_overhead_bits=overhead)
        elif overhead:
            plan[name] = LayerBits(weight=32, act=32, weight_groups=0, act_groups=0, weight_overhead_bits=overhead)


def describe_caches(model: nn.Module) -> dict[str, Any]:
    """What install_caches() needs to make the model's caches again, still without values."""
    return {name: cache.spec() for name, cache in caches_of(model).items()}


def install_caches(model: nn.Module, description: dict[str, Any]) -> None:
    """Attach the described caches; attach_clock() afterwards shows them the clock."""
    for name, spec in description.items():
        attach_cache(model.get_submodule(name), FeatureCache(**spec))
