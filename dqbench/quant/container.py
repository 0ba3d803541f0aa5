"""Many tensors in one safetensors file that is hardly larger than they are, with a description: docs/packed_format.md.

The file has two tensors of bytes. data: those of all tensors, one after the other. index: deflated JSON, {"tensors":
[[shared, rest, dtype, shape], ...] in that order, and what the writer has to say}; a name is the first `shared`
characters of the one before, and `rest`. Its metadata: format, version, and the SHA-256 of the index and then the data.
A Writer puts each tensor into the file when it is given, and the header, for which it leaves room, at the end.
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

import torch
from safetensors import safe_open
from torch import Tensor

from dqbench.errors import UserError
from dqbench.quant.packing import dtype_of, name_of, readable

FORMAT, VERSION = "dqbench.packed", 2
INDEX, DATA = "index", "data"
HEADER = 384  # bytes before the data, enough for sizes of 18 digits
BLOCK = 2**20


class Writer:
    """A file in the making, tensor by tensor; it can be read after complete()."""

    def __init__(self, file: Path) -> None:
        self.file, self.described = file.open("w+b"), {}
        self.file.write(bytes(HEADER))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far."""
        return self.file.tell() - HEADER

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of any dtype and shape."""
        self.described[name] = (tensor.dtype, list(tensor.shape))
        self.file.write(as_bytes(tensor).numpy().data)

    def extend(self, name: str, rows: Tensor) -> None:
        """More rows [N, ...] of the tensor `name`, which is the last one or a new one."""
        before = self.described.get(name, (rows.dtype, [0]))[1][0]
        self.add(name, rows)
        self.described[name][1][0] += before

    def complete(self, content: Mapping[str, Any]) -> int:
        """Write index and header; content: JSON-able, not "tensors". Returns the bytes of the tensors."""
        size = self.nbytes
        described = json.dumps({**content, "tensors": describe(self.described)}, separators=(",", ":"))
        index = zlib.compress(described.encode(), 9)
        total = hashlib.sha256(index)
        self.file.seek(HEADER)
        while block := self.file.read(BLOCK):
            total.update(block)
        self.file.write(index)
        self.file.seek(0)
        self.file.write(header(size, len(index), total.hexdigest()))
        return size


def write(file: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> int:
    """Write tensors of any dtype and shape; content: JSON-able, not "tensors". Returns the bytes of the tensors."""
    with Writer(file) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.complete(content)


def header(data: int, index: int, sha256: str) -> bytes:
    """The beginning of a safetensors file with tensors of `data` and `index` bytes, HEADER bytes long."""
    metadata = {"format": FORMAT, "version": str(VERSION), "sha256": sha256}
    ends = {DATA: (0, data), INDEX: (data, data + index)}
    parts = {
        name: {"dtype": "U8", "shape": [end - first], "data_offsets": [first, end]}
        for name, (first, end) in ends.items()
    }
    text = json.dumps({"__metadata__": metadata, **parts}, separators=(",", ":")).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


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


def describe(tensors: Mapping[str, tuple[torch.dtype, list[int]]]) -> list[list[Any]]:
    """[shared, rest, dtype, shape] of each tensor, from its dtype and shape."""
    pairs = [(len(os.path.commonprefix(pair)), pair[1]) for pair in pairwise(["", *tensors])]
    return [[shared, name[shared:], name_of(tensors[name][0]), tensors[name][1]] for shared, name in pairs]


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
