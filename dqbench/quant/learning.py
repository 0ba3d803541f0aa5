"""What a unit is while it is learned: float32 at least, with or without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dqbench.config import Recon

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def learning(unit: nn.Module, recon: Recon, seed: int) -> Iterator[None]:
    """Inside: the unit computes in float32 at least, and its dropout is active, if asked for, drawing from `seed`."""
    with ExitStack() as stack:
        stack.enter_context(in_float32(unit))
        if recon.dropout:
            device = next(unit.parameters()).device
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            torch.manual_seed(seed & 0x7FFFFFFF)
            unit.train()
            stack.callback(unit.eval)
        yield


@contextmanager
def in_float32(unit: nn.Module) -> Iterator[None]:
    """Inside: what the unit holds in half precision is float32. After: half again, with what was learned.

    Mean losses over a whole image have gradients that float16 cannot represent, and Adam's steps are lost in bfloat16.
    """
    halves = {name: tensor.dtype for name, tensor in tensors_of(unit) if tensor.dtype in HALF}
    for _, tensor in tensors_of(unit):
        tensor.data = widened(tensor.data)
    try:
        yield
    finally:
        for name, tensor in tensors_of(unit):
            tensor.data = tensor.data.to(halves.get(name, tensor.dtype))


def tensors_of(unit: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a unit by name."""
    return chain(unit.named_parameters(), unit.named_buffers())


def widened(value: Any) -> Any:
    """`value`, nested as a unit's arguments are, with float32 in place of half-precision tensors."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, value)
