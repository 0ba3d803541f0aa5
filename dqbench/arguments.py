"""The arguments of a denoiser's call as arrays by name: what a calibration set holds of it, and how it is called again.

Diffusers' pipelines hand some conditions on in a dict; its entries are called "added_cond_kwargs.text_embeds" here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]  # argument -> tensor [B, ...], or a dict of them
SAMPLES = ("sample", "hidden_states")  # what denoisers call the tensor that is denoised


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Arguments with the entries of dicts at the top: {"a": {"b": x}} -> {"a.b": x}."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> Batch:
    """The arguments as the denoiser takes them: the reverse of flatten()."""
    arguments: Batch = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = arguments
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return arguments


def call_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one denoiser call by name, as copies on the CPU, timestep broadcast to [B]."""
    arguments = flatten(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    batch_size = len(next(arguments[name] for name in SAMPLES if name in arguments))
    timestep = torch.as_tensor(arguments["timestep"]).reshape(-1)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    tensors["timestep"] = timestep.expand(batch_size)
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}
