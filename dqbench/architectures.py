"""A denoiser from its config alone, and the multiplications of one forward: on the meta device, nothing is computed."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dqbench.arguments import flatten, nest
from dqbench.errors import UserError
from dqbench.models import locate
from dqbench.quant.plan import LAYER_TYPES

Macs = Counter[tuple[str, str]]  # (module name, kind) -> multiply-accumulates, in execution order


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The network of a config in eval mode, its parameters on the meta device.

    `_class_name`: a diffusers model, or a network of dqbench.text.networks, whose own config calls it `architectures`.
    """
    name = architecture.get("_class_name") or next(iter(architecture.get("architectures") or ()), None)
    config = {key: value for key, value in architecture.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            return create(str(name), config).eval()
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"architecture: {name} cannot be built: {error}") from error


def create(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of class `name`. Raises UserError where there is none of that name."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if inspect.isclass(cls) and issubclass(cls, nn.Module):
        return cls(**config)
    from dqbench.text import networks

    if name not in networks.NETWORKS:
        allowed = f"a diffusers model, for example UNet2DModel, or {', '.join(networks.NETWORKS)}"
        raise UserError(f"architecture._class_name={name} is unknown; allowed: {allowed}")
    cls = getattr(networks, name)
    return cls(cls.config_class(**config))


def untrained(folder: Path, denoiser: str) -> nn.Module:
    """The denoiser of a pipeline's folder with random weights, of the class that model_index.json names."""
    cls = locate(".".join(json.loads((folder / "model_index.json").read_text())[denoiser]))
    config = json.loads((folder / denoiser / "config.json").read_text())
    return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class.from_dict(config))


@torch.no_grad()
def count_macs(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Macs:
    """MACs of one forward at batch 1: conv, linear, and per attention QK^T (attention_qk) and softmax V (attention_sv).

    `inputs`: shapes without the batch dimension, or true for one class index. Parameters of a loaded denoiser are
    replaced by meta tensors for the call.
    """
    state = {name: x.to("meta") for name, x in chain(denoiser.named_parameters(), denoiser.named_buffers())}
    dtype = next(denoiser.parameters()).dtype
    arguments = nest({name: example(name, shape, dtype) for name, shape in flatten(inputs).items()})
    if "timestep" in inspect.signature(type(denoiser).forward).parameters:
        arguments["timestep"] = torch.zeros(1, dtype=torch.long, device="meta")
    macs: Macs = Counter()
    with metered(denoiser, macs):
        functional_call(denoiser, state, args=(), kwargs=arguments)
    check_attention(denoiser, macs)
    return macs


def example(name: str, shape: Any, dtype: torch.dtype) -> Tensor:
    """An input of batch 1 on the meta device: [1, *shape], or one class index for `true`; token ids are integers."""
    if shape is True:
        return torch.zeros(1, dtype=torch.long, device="meta")
    if name.endswith("_ids") and name != "added_cond_kwargs.time_ids":
        return torch.zeros(1, *shape, dtype=torch.long, device="meta")
    return torch.empty(1, *shape, dtype=dtype, device="meta")


@contextmanager
def metered(denoiser: nn.Module, macs: Macs) -> Iterator[None]:
    """Add to `macs` what the forwards of `denoiser` inside the block multiply."""
    running: list[str] = []
    with ExitStack() as stack:
        for name, module in denoiser.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            leave = module.register_forward_hook(lambda *_: drop_last(running))
            stack.callback(enter.remove)
            stack.callback(leave.remove)
            if isinstance(module, LAYER_TYPES):
                stack.callback(module.register_forward_hook(layer_meter(name, macs)).remove)
        stack.enter_context(AttentionMeter(running, macs))
        yield


def drop_last(running: list[str]) -> None:
    """Forget the innermost running module: its forward has ended."""
    running.pop()


def layer_meter(name: str, macs: Macs) -> Any:
    """A forward hook that counts a conv or linear: every output position multiplies the weight once."""

    def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
        kind = "linear" if isinstance(layer, nn.Linear) else "conv"
        macs[name, kind] += output.numel() // layer.weight.shape[0] * layer.weight.numel()

    return hook


class AttentionMeter(TorchFunctionMode):
    """Counts every scaled_dot_product_attention for the innermost running module, from the shapes it is given."""

    def __init__(self, running: list[str], macs: Macs) -> None:
        super().__init__()
        self.running, self.macs = running, macs

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.add(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def add(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
        """query: [..., N, D], key: [..., M, D], value: [..., M, E]."""
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        self.macs[self.running[-1], "attention_qk"] += scores * query.shape[-1]
        self.macs[self.running[-1], "attention_sv"] += scores * value.shape[-1]


def check_attention(denoiser: nn.Module, macs: Macs) -> None:
    """Raise UserError where an attention took another way than scaled_dot_product_attention and so was not seen."""
    for name, module in denoiser.named_modules():
        if hasattr(module, "to_q") and hasattr(module, "to_k") and (name, "attention_qk") not in macs:
            raise UserError(f"cost: {name} does not call scaled_dot_product_attention; count before it is quantized")
