"""Packed weights in torchao's own checkpoint form: what its safetensors support flattens its tensors to (0.18).

| weight                             | torchao's tensor         | NAME._weight_qdata                   |
|------------------------------------|--------------------------|--------------------------------------|
| uniform grid, int with fp16 scales | IntxUnpackedToInt8Tensor | int8, a byte for a code of any width |
| mxfp4, of a linear layer           | MXTensor                 | uint8, two codes in one              |
| nvfp4, of a linear layer           | NVFP4Tensor              | uint8, two codes in one              |

Beside qdata NAME._weight_scale, with an int NAME._weight_zero_point, with nvfp4 NAME._weight_per_tensor_scale; and
metadata[NAME.weight]. Blocks must be of one shape: groups that divide the input channels of a linear layer, or, of
ints, whole rows. dequantize() is bit-equal. Writing it does not need torchao.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant import block_weights, packing, uniform
from dqbench.quant.storage import storages

Header = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One weight as torchao has it: the tensors by their names there, the class, and its other attributes."""

    parts: dict[str, Tensor]
    kind: str
    attributes: dict[str, Any]


def save_torchao(model: nn.Module, file: Path) -> None:
    """Write the packed weights that torchao has a form for. Raises UserError where there is none."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, storage in storages(model).items():
        make = FORMS.get(storage.header()["kind"])
        if make is not None and (form := make(storage.pack(), storage.header())) is not None:
            tensors |= {f"{name}._weight_{key}": value for key, value in form.parts.items()}
            described = {"_type": form.kind, "_data": form.attributes, "_tensor_data_names": list(form.parts)}
            metadata[f"{name}.weight"] = json.dumps(described)
    if not tensors:
        raise UserError("layout=torchao: no weight has a form in torchao; allowed: plain")
    save_file(tensors, file, {**metadata, "tensor_names": json.dumps(list(metadata))})


def of_uniform(tensors: Mapping[str, Tensor], header: Header) -> Form | None:
    """A uniform storage; None for what blocks of one shape, or int8, cannot express."""
    shape, n_bits, scale = header["shape"], header["bits"], tensors["scale"]
    if header["split"] or not fits(shape, scale.shape[1], header["group_size"]):
        return None
    half = 2 ** (n_bits - 1)
    codes = packing.unpack(tensors["codes"], torch.Size(shape).numel(), n_bits).reshape(shape).short() - half
    zero_point = uniform.unpack_whole(tensors["zero_point"], scale.numel(), header["zero_point"]) - half
    if not torch.equal(zero_point.to(torch.int8).long(), zero_point):
        return None
    return intx(codes, scale, zero_point, header, n_bits)


def of_blocks(tensors: Mapping[str, Tensor], header: Header) -> Form | None:
    """A storage in a block format; None where its groups span taps of a convolution, or are short at the end."""
    shape, scale = header["shape"], tensors["scale"]
    if header["element"] == "int":
        if not fits(shape, scale.shape[1], header["group_size"]):
            return None
        codes = block_weights.from_rows(block_weights.code_rows(tensors, header), shape)
        return intx(codes, scale.float(), torch.zeros_like(scale), header, header["n_bits"])
    if len(shape) > 2 or shape[1] % header["group_size"]:
        return None
    qdata = tensors["codes"].reshape(shape[0], -1)
    same = {"block_size": header["group_size"], "orig_dtype": dtype_name(header["dtype"]), "is_swizzled_scales": False}
    if header["scale"] == "e4m3":
        parts = {"qdata": qdata, "scale": scale, "per_tensor_scale": tensors["tensor_scale"]}
        return Form(parts, "NVFP4Tensor", same | {"use_triton_kernel": False, "act_quant_kwargs": None})
    emulated = {"_type": "KernelPreference", "_data": "EMULATED"}
    own = {"elem_dtype": dtype_name("float4_e2m1fn_x2"), "kernel_preference": emulated, "act_quant_kwargs": None}
    return Form({"qdata": qdata, "scale": scale.view(torch.float8_e8m0fnu)}, "MXTensor", same | own)


def fits(shape: list[int], groups: int, group_size: int | None) -> bool:
    """Whether `groups` groups in a row are blocks of one shape."""
    return groups == 1 or len(shape) == 2 and shape[1] % group_size == 0


def intx(codes: Tensor, scale: Tensor, zero_point: Tensor, header: Header, n_bits: int) -> Form:
    """scale (codes - zero_point); codes: signed, the weight's shape; scale, zero_point: [R, G]."""
    blocks = [*scale.shape, *[1] * (codes.ndim - 2)]
    parts = {"qdata": codes.to(torch.int8).contiguous(), "scale": scale.reshape(blocks)}
    parts["zero_point"] = zero_point.to(torch.int8).reshape(blocks)
    block = [whole // count for whole, count in zip(codes.shape, blocks, strict=True)]
    attributes = {"target_dtype": dtype_name(f"int{n_bits}"), "block_size": block, "dtype": dtype_name(header["dtype"])}
    return Form(parts, "IntxUnpackedToInt8Tensor", attributes | {"activation_quantization": None})


def dtype_name(name: str) -> dict[str, str]:
    """As torchao writes a dtype in JSON."""
    return {"_type": "torch.dtype", "_data": name}


FORMS: dict[str, Callable[[Mapping[str, Tensor], Header], Form | None]] = {  # by kind of weight storage
    uniform.KIND: of_uniform,
    block_weights.KIND: of_blocks,
}
