"""Where a convolution reads a skip concatenation, and where in it the first part ends (Q-Diffusion, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqbench.quant.plan import matches


class _Concatenations(TorchFunctionMode):
    """Remembers torch.cat results along channels: address of the result -> channels of its first operand."""

    def __init__(self) -> None:
        super().__init__()
        self.first_channels: dict[int, int] = {}
        self.alive: list[Tensor] = []  # keeps addresses from being used again

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat) and result.ndim >= 3 and len(args[0]) == 2:
            self.first_channels[result.data_ptr()] = args[0][0].shape[1]
            self.alive.append(result)
        return result


@torch.no_grad()
def skip_splits(student: nn.Module, batch: dict[str, Tensor], patterns: Sequence[str]) -> dict[str, int]:
    """Convs whose input is a skip concatenation -> channels of its first operand, seen in one forward pass."""
    splits: dict[str, int] = {}
    handles = []
    with _Concatenations() as seen:
        for name, layer in student.named_modules():
            if matches(name, patterns):
                handles.append(layer.register_forward_pre_hook(_split_recorder(name, seen, splits)))
        try:
            student(**batch)
        finally:
            for handle in handles:
                handle.remove()
    return splits


def _split_recorder(name: str, seen: _Concatenations, splits: dict[str, int]) -> Callable:
    def record(layer: nn.Module, args: tuple) -> None:
        if args[0].data_ptr() in seen.first_channels:
            splits[name] = seen.first_channels[args[0].data_ptr()]

    return record
