"""Packed weights in torchao's own checkpoint form: what its safetensors support flattens its tensors to (0.18).

NAME.weight on a uniform grid becomes an IntxUnpackedToInt8Tensor: NAME._weight_qdata int8, the weight's shape, one byte
for a code whatever its width; NAME._weight_scale and, int8, NAME._weight_zero_point, one for each block; and
metadata[NAME.weight]. dequantize() is scale (qdata - zero_point), bit-equal. Writing it does not need torchao.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant import packing, uniform
from dqbench.quant.storage import storages


def save_torchao(model: nn.Module, file: Path) -> None:
    """Write the packed weights that torchao has a form for. Raises UserError where there is none."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, storage in storages(model).items():
        if (parts := intx(storage.pack(), storage.header())) is not None:
            tensors |= {f"{name}._weight_{key}": value for key, value in parts.items()}
            metadata[f"{name}.weight"] = json.dumps(described(parts, storage.header()))
    if not tensors:
        raise UserError("layout=torchao: no weight has a form in torchao; allowed: plain")
    save_file(tensors, file, {**metadata, "tensor_names": json.dumps(list(metadata))})


def intx(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """qdata, scale and zero_point of a uniform storage; None for what blocks of one shape, or int8, cannot express."""
    if header["kind"] != uniform.KIND or header["split"]:
        return None
    shape, n_bits, scale = header["shape"], header["bits"], tensors["scale"]
    if scale.shape[1] > 1 and (len(shape) > 2 or shape[1] % header["group_size"]):
        return None
    half, blocks = 2 ** (n_bits - 1), [*scale.shape, *[1] * (len(shape) - 2)]
    codes = packing.unpack(tensors["codes"], torch.Size(shape).numel(), n_bits).reshape(shape).short() - half
    zero_point = uniform.unpack_whole(tensors["zero_point"], scale.numel(), header["zero_point"]) - half
    if not torch.equal(zero_point.to(torch.int8).long(), zero_point):
        return None
    ranges = {"scale": scale.reshape(blocks), "zero_point": zero_point.to(torch.int8).reshape(blocks)}
    return {"qdata": codes.to(torch.int8), **ranges}


def described(parts: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """What torchao reads beside the tensors."""
    block = [whole // count for whole, count in zip(header["shape"], parts["scale"].shape, strict=True)]
    width, dtype = ({"_type": "torch.dtype", "_data": name} for name in (f"int{header['bits']}", header["dtype"]))
    data = {"target_dtype": width, "block_size": block, "dtype": dtype, "activation_quantization": None}
    return {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": list(parts)}
