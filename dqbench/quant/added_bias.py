"""Biases that quantization adds: a plain one where a layer has none, or one per bin of diffusion time beside its own.

The plan of a network says how many numbers a layer got (LayerBits.added_bias), which is what a checkpoint restores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dqbench.quant.time_bins import current


def channel_axis(layer: nn.Module) -> int:
    """Where a conv's or linear layer's output has its channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def aligned(shift: Tensor, index: Tensor, like: Tensor, axis: int) -> Tensor:
    """What of shift [K, O] is added to each row of `like`, broadcastable to it.

    index: the rows' bins, [1] where all have the same, else [B] for B k rows, k consecutive ones of each; axis: of the
    channels.
    """
    own = shift.index_select(0, index.to(shift.device))
    if len(own) > 1:
        own = own.repeat_interleave(len(like) // len(own), dim=0)
    shape = [len(own), *[1] * (like.ndim - 1)]
    shape[axis] = own.shape[1]
    return own.reshape(shape)


class TimeBias(nn.Module):
    """Adds shift[k] to what a layer returns for the rows of bin k. shift: buffer [K, O]; axis: of the channels."""

    def __init__(self, shift: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("shift", shift)

    def forward(self, output: Tensor) -> Tensor:
        """output: [B, ...], or [B k, ...] with k consecutive entries for each row."""
        return output + aligned(self.shift, current().index, output, self.axis)

    def extra_repr(self) -> str:
        return f"bins={len(self.shift)}"


def add_bias(layer: nn.Module, bins: int = 1) -> None:
    """Give a layer zeros to add to its output: as its bias, which it lacks, or for each of several bins of time."""
    zeros = layer.weight.new_zeros(bins, len(layer.weight))
    if bins == 1:
        layer.bias = nn.Parameter(zeros[0], requires_grad=False)
    else:
        layer.time_bias = TimeBias(zeros, channel_axis(layer))
        layer.register_forward_hook(_add_time_bias)


def _add_time_bias(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return layer.time_bias(output)


def restore_bias(layer: nn.Module, count: int) -> None:
    """add_bias() as a plan says: `count` numbers, 0 for none."""
    if count:
        add_bias(layer, count // len(layer.weight))


@torch.no_grad()
def shift_output(layer: nn.Module, shift: Tensor) -> int:
    """Add shift [K, O] of K bins of time to what a layer returns; returns how many numbers that adds to the layer."""
    if len(shift) == 1 and layer.bias is not None:
        layer.bias += shift[0].to(layer.bias.dtype)
        return 0
    add_bias(layer, len(shift))
    target = layer.bias if len(shift) == 1 else layer.time_bias.shift
    target.copy_(shift.reshape(target.shape))
    return target.numel()
