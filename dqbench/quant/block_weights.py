"""Weights in a block format: baked into plain layers, billed, and packed.

The rows of a weight [O, I, ...] are its output channels, with the input channels innermost, as a matmul over
[..., tap, channel] reads them; groups run along such a row and may span taps. So one scale serves weights that meet
one group of an activation (quant/dynamic.py) wherever the group size divides I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant import packing
from dqbench.quant.block_formats import SCALE_BITS, TENSOR_SCALE_BITS, BlockFormat, Blocks, decode, encode
from dqbench.quant.storage import Packed

KIND, VERSION = "block_format", 1


def bake(layer: nn.Module, form: BlockFormat, n_bits: int) -> None:
    """Round the layer's weight in place, and keep how it is stored as `layer.weight_storage`."""
    weight = layer.weight.detach()
    blocks = encode(to_rows(weight), form, n_bits)
    layer.weight.data = from_rows(decode(blocks, form), weight.shape).to(weight.dtype)
    layer.weight_storage = store(blocks, form, n_bits, weight)


def overhead_bits(shape: Sequence[int], form: BlockFormat) -> int:
    """Stored bits beside the elements of a weight of this shape: scales of groups, and of the tensor."""
    scales = shape[0] * form.groups(prod(shape[1:])) * SCALE_BITS[form.scale]
    return scales + TENSOR_SCALE_BITS * form.per_tensor


def to_rows(weight: Tensor) -> Tensor:
    """[O, I, ...] -> [O, ... I]."""
    return weight.movedim(1, -1).flatten(1)


def from_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[O, ... I] -> [O, I, ...], with the strides of a new tensor: of others a conv makes other rounding errors."""
    outputs, inputs, *taps = shape
    new = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    return new.copy_(rows.reshape(outputs, *taps, inputs).movedim(-1, 1))


def store(blocks: Blocks, form: BlockFormat, n_bits: int, weight: Tensor) -> Packed:
    """Packed codes (two's complement, or E2M1 as torch.float4_e2m1fn_x2 has it: the first in the low half), scales."""
    codes = blocks.codes.to(torch.int16) & (2**n_bits - 1)
    tensors = {"codes": packing.pack(codes, n_bits), "scale": blocks.scale.cpu()}
    if form.per_tensor:
        tensors["tensor_scale"] = blocks.tensor_scale.cpu()
    content = {"version": VERSION, "shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    content |= {"n_bits": n_bits, "element": form.element, "group_size": form.group_size, "scale": form.scale}
    return Packed.of(KIND, tensors, content)


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The weight that store() packed, bit-equal to the one that bake() left in the layer."""
    if header["version"] != VERSION:
        raise UserError(f"weight storage {KIND} has version {header['version']}; readable: {VERSION}")
    form = BlockFormat(header["element"], header["group_size"], header["scale"])
    codes = code_rows(tensors, header)
    rows = decode(Blocks(codes, tensors["scale"], tensors.get("tensor_scale", torch.ones(()))), form)
    return from_rows(rows, header["shape"]).to(packing.dtype_of(header["dtype"]))


def code_rows(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The codes of a storage, int8 [O, ... I]: signed integers, or those of E2M1."""
    n_bits, shape = header["n_bits"], header["shape"]
    codes = packing.unpack(tensors["codes"], prod(shape), n_bits).to(torch.int8).reshape(shape[0], -1)
    signed = header["element"] == "int" and n_bits < 8
    return torch.where(codes >= 2 ** (n_bits - 1), codes - 2**n_bits, codes) if signed else codes
