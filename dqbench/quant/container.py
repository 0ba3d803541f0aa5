"""Many tensors in one safetensors file that is hardly larger than they are, with a description: docs/packed_format.md.

The file has two tensors of bytes. data: those of all tensors, one after the other. index: deflated JSON, {"tensors":
[[shared, rest, dtype, shape], ...] in that order, and what the writer has to say}; a name is the first `shared`
characters of the one before, and `rest`. Its metadata: format, version, and the SHA-256 of the index and then the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqbench.errors import UserError
from dqbench.quant.packing import dtype_of, name_of, readable

FORMAT, VERSION = "dqbench.packed", 2
INDEX, DATA = "index", "data"


def write(file: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> int:
    """Write tensors of any dtype and shape; content: JSON-able, not "tensors". Returns the bytes of the tensors."""
    index = json.dumps({**content, "tensors": describe(tensors)}, separators=(",", ":")).encode()
    data = torch.cat([torch.empty(0, dtype=torch.uint8), *map(as_bytes, tensors.values())])
    parts = {INDEX: torch.from_numpy(np.frombuffer(zlib.compress(index, 9), np.uint8).copy()), DATA: data}
    save_file(parts, file, {"format": FORMAT, "version": str(VERSION), "sha256": digest(parts)})
    return len(data)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, content) as they went into write(). Raises UserError for a damaged, older or foreign file."""
    with readable(str(file)), safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
        check_version(str(file), metadata.get("format"), metadata.get("version"))
        parts = {name: stored.get_tensor(name) for name in (INDEX, DATA)}
        if metadata.get("sha256") != digest(parts):
            raise UserError(f"{file} is truncated or altered: its checksum does not match")
        content = json.loads(zlib.decompress(parts[INDEX].numpy().tobytes()))
        return dict(split(parts[DATA], content.pop("tensors"))), content


def check_version(what: str, form: Any, version: Any) -> None:
    """Raise UserError unless these are the format and version that this module writes."""
    if (form, version) != (FORMAT, str(VERSION)):
        found = f"version {version} of {form}" if form else "no packed network"
        raise UserError(f"{what} holds {found}; this dqbench reads version {VERSION} of {FORMAT}")


def describe(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """[shared, rest, dtype, shape] of each tensor."""
    pairs = [(len(os.path.commonprefix(pair)), pair[1]) for pair in pairwise(["", *tensors])]
    return [[shared, name[shared:], name_of(tensors[name].dtype), list(tensors[name].shape)] for shared, name in pairs]


def split(data: Tensor, described: list[list[Any]]) -> list[tuple[str, Tensor]]:
    """(name, tensor) in the order of the index. Raises ValueError where it does not describe all of `data`."""
    names = list(accumulate(described, lambda before, entry: before[: entry[0]] + entry[1], initial=""))[1:]
    dtypes, shapes = ([kind(entry[k]) for entry in described] for k, kind in ((2, dtype_of), (3, torch.Size)))
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True)]
    if sum(sizes) != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, the index describes {sum(sizes)}")
    parts = zip(names, data.split(sizes), dtypes, shapes, strict=True)
    return [(name, part.clone().view(dtype).reshape(shape)) for name, part, dtype, shape in parts]


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8, on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def digest(parts: Mapping[str, Tensor]) -> str:
    """SHA-256 of the index and then the data, in hex."""
    total = hashlib.sha256(parts[INDEX].numpy())
    total.update(parts[DATA].numpy())
    return total.hexdigest()
