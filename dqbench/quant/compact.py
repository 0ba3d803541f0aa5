"""The state of a quantized network without its packed weights: zero points and cached features in their own bits.

Tensors keep the names of the state dict, except what is stored together, in the order of module names:
quantizers/scale (float32) and quantizers/zero_point (packed whole numbers) of all activation quantizers and caches, as
far as they store any, and LAYER/cache.codes, LAYER/cache.chosen (one bit for each timestep; absent where all are in
use) of each cache. Weights that have a storage are not here, and parameters of layers that nothing reads are nowhere:
they are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.config import OFF
from dqbench.errors import UserError
from dqbench.quant import packing
from dqbench.quant.dynamic import BlockQuantizer, LzsQuantizer
from dqbench.quant.feature_cache import FeatureCache, caches_of
from dqbench.quant.quantizers import ActQuantizer
from dqbench.quant.residual_acts import TwoStageQuantizer
from dqbench.quant.storage import storages
from dqbench.quant.uniform import pack_whole, unpack_whole

SCALE, ZERO_POINT, CODES, CHOSEN = "quantizers/scale", "quantizers/zero_point", "/cache.codes", "/cache.chosen"
BUFFERS = ("scale", "zero_point")
RANGED = (ActQuantizer, TwoStageQuantizer, LzsQuantizer, BlockQuantizer)
Tensors = dict[str, Tensor]


def pack_state(model: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, header) of a frozen network; with its weight storages they are all of its state. header: JSON-able."""
    shared = twins(model)
    moved, held = elsewhere(model) | shared.keys(), list(ranged(model))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in moved}
    if any(module.scale.dtype != torch.float32 for _, module in held):
        raise UserError("parameters of activation quantizers are not float32; leave them so when casting a network")
    header: dict[str, Any] = {"dtype": packing.name_of(next(model.parameters()).dtype)}
    if shared:
        header["shared"] = shared
    values = {key: [rows(module, key) for _, module in held] for key in BUFFERS}
    if any(part.numel() for part in values["scale"]):
        tensors[SCALE] = torch.cat(values["scale"])
    if any(part.numel() for part in values["zero_point"]):
        width = max(max(getattr(module, "widths", [module.n_bits])) for _, module in held)
        tensors[ZERO_POINT], header["zero_point"] = pack_whole(torch.cat(values["zero_point"]).cpu(), width)
    for layer, cache in caches_of(model).items():
        tensors |= pack_cache(layer, cache)
    return tensors, header


def unpack_state(model: nn.Module, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensors:
    """The state dict that pack_state() took apart, without packed weights. model: with all its quantizers installed."""
    state = {name: value for name, value in tensors.items() if "/" not in name}
    state |= {name: state[first] for name, first in header.get("shared", {}).items()}
    none = torch.zeros(0)
    for layer, cache in caches_of(model).items():
        state |= unpack_cache(f"{layer}.feature_cache", cache, tensors[layer + CODES], tensors.get(layer + CHOSEN))
        cache.chosen = state[f"{layer}.feature_cache.chosen"]
    held = list(ranged(model))
    counts = {key: [len(rows(module, key)) for _, module in held] for key in BUFFERS}
    stored = {"scale": tensors.get(SCALE, none), "zero_point": none}
    if ZERO_POINT in tensors:
        found = unpack_whole(tensors[ZERO_POINT], sum(counts["zero_point"]), header["zero_point"])
        stored["zero_point"] = found.float()
    for key in BUFFERS:
        for (name, module), part in zip(held, stored[key].split(counts[key]), strict=True):
            if hasattr(module, key):
                state[f"{name}.{key}"] = put(module, key, part)
    dtype = packing.dtype_of(header["dtype"])
    return state | {name: torch.zeros(shape, dtype=dtype) for name, shape in unread(model).items()}


def twins(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one under a second name -> its first name, as those of tied embeddings."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(parameter, name) for name, parameter in named}
    return {name: original for name, original in found.items() if name != original}


def tie(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Make parameters one that twins() found to be."""
    for name, first in shared.items():
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, model.get_parameter(first))


def elsewhere(model: nn.Module) -> set[str]:
    """Names of the state dict that are stored in another form, or not at all."""
    caches = [f"{layer}.feature_cache.{key}" for layer in caches_of(model) for key in ("codes", "chosen", *BUFFERS)]
    quantizers = [f"{name}.{key}" for name, _ in ranged(model) for key in BUFFERS]
    return {f"{layer}.weight" for layer in storages(model)} | {*caches, *quantizers, *unread(model)}


def ranged(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What holds scale and zero_point of activations: quantizers, and caches that are quantized; by name."""
    for name, module in sorted(model.named_modules()):
        if isinstance(module, RANGED) or isinstance(module, FeatureCache) and module.n_bits not in OFF:
            yield name, module


def rows(module: nn.Module, key: str) -> Tensor:
    """The stored elements of a buffer, flat; of a cache those of the timesteps in use; none where it has no such."""
    values = getattr(module, key, module.scale.new_zeros(0))
    return (values[module.chosen] if isinstance(module, FeatureCache) else values).flatten()


def put(module: nn.Module, key: str, stored: Tensor) -> Tensor:
    """A whole buffer that rows() took `stored` from; what was not stored is as in a new module."""
    if not isinstance(module, FeatureCache):
        return stored.reshape(getattr(module, key).shape)
    values = getattr(module, key).clone()
    values[module.chosen] = stored.reshape(-1, 1)
    return values


def unread(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters that the plan says nothing reads."""
    unused = [name for name, bits in getattr(model, "plan", {}).items() if bits.weight == 0]
    parts = [(layer, model.get_submodule(layer).named_parameters(recurse=False)) for layer in unused]
    return {f"{layer}.{name}": value.shape for layer, named in parts for name, value in named}


def pack_cache(layer: str, cache: FeatureCache) -> Tensors:
    """The codes of a cache's timesteps in use, and which these are."""
    codes = cache.codes[cache.chosen]
    tensors = {layer + CODES: codes.contiguous() if cache.n_bits in OFF else packing.pack(codes, cache.n_bits)}
    return tensors if cache.complete else tensors | {layer + CHOSEN: packing.pack(cache.chosen, 1)}


def unpack_cache(name: str, cache: FeatureCache, packed: Tensor, chosen: Tensor | None) -> Tensors:
    """The buffers of the cache `name`; those of a quantized one's ranges are still those of a new module."""
    steps, channels = cache.codes.shape
    used = torch.ones(steps, dtype=torch.bool) if chosen is None else packing.unpack(chosen, steps, 1).bool()
    count, codes = int(used.sum()) * channels, torch.zeros_like(cache.codes)
    stored = packed if cache.n_bits in OFF else packing.unpack(packed, count, cache.n_bits)
    codes[used] = stored.reshape(-1, channels)
    values = {"codes": codes, "chosen": used, "scale": cache.scale, "zero_point": cache.zero_point}
    return {f"{name}.{key}": value for key, value in values.items()}
