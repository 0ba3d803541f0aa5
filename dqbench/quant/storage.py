"""What a quantized weight is on disk: a layer's `weight_storage` holds compact tensors and a header that rebuild it.

A method sets `layer.weight_storage` to anything with pack() and header(), usually a Packed. header()["kind"] names the
function of KINDS that rebuilds the weight, bit-equal to layer.weight. The header is JSON and sealed: packing.seal().
save_storages() writes them beside a network's state dict, as the cache has them; export.py writes the compact file.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant.packing import check_seal, name_of, nbytes, readable, seal

FORMAT, VERSION = "dqbench.weight_storage", 1
KINDS = {  # kind of a weight storage -> the function (tensors, header) -> weight
    "two_stage": "dqbench.quant.residual_weights:unpack",
    "block_format": "dqbench.quant.block_weights:unpack",
    "uniform": "dqbench.quant.uniform:unpack",
    "multi_binary": "dqbench.quant.multi_binary:unpack",
    "codebook": "dqbench.quant.codebook:unpack",
}


class WeightStorage(Protocol):
    """A weight as it is stored."""

    def pack(self) -> dict[str, Tensor]:
        """Compact tensors: packed codes, scales, indices."""

    def header(self) -> dict[str, Any]:
        """JSON-able: the kind, its version, shapes and whatever the tensors do not say."""


@dataclass(frozen=True)
class Packed:
    """A weight storage that has been made already, or was read from disk."""

    tensors: dict[str, Tensor]
    content: dict[str, Any]

    @classmethod
    def of(cls, kind: str, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> Packed:
        """Sealed, of a kind in KINDS."""
        return cls(tensors, seal(tensors, {"kind": kind, **content}))

    def pack(self) -> dict[str, Tensor]:
        return self.tensors

    def header(self) -> dict[str, Any]:
        return self.content


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """The weight that a storage holds. Raises UserError for an unknown kind, and for damaged content."""
    kind = header.get("kind")
    if kind not in KINDS:
        raise UserError(f"weight storage of kind {kind} is unknown; known: {', '.join(KINDS)}")
    check_seal(tensors, header, f"weight storage of kind {kind}")
    with readable(f"weight storage of kind {kind}"):
        return pkgutil.resolve_name(KINDS[kind])(tensors, header)


def recast(storage: WeightStorage, weight: Tensor, name: str) -> Packed:
    """The storage of `weight`, in whose dtype it unpacks: a network may have been cast after it was quantized.

    Raises UserError where that is not what the storage holds: then something else has changed the weight.
    """
    header = {**storage.header(), "dtype": name_of(weight.dtype)}
    found = Packed(storage.pack(), seal(storage.pack(), header))
    if not torch.equal(unpack(found.tensors, found.content), weight.detach().cpu()):
        raise UserError(f"{name}.weight is not what its storage holds: it was changed after it was quantized")
    return found


def check_filled(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise UserError where a layer has no weights: there is no range to choose, and nothing to store."""
    if empty := [name for name in layers if not model.get_submodule(name).weight.numel()]:
        raise UserError(f"layers without any weights cannot be quantized: {', '.join(empty)}; add them to method.skip")


def stored_bits(storage: WeightStorage) -> int:
    """Bits of the tensors of a storage."""
    return 8 * nbytes(storage.pack())


def storages(model: nn.Module) -> dict[str, WeightStorage]:
    """The weight storages below `model`, by layer."""
    found = ((name, getattr(layer, "weight_storage", None)) for name, layer in model.named_modules())
    return {name: storage for name, storage in found if storage is not None}


def save_storages(model: nn.Module, file: Path) -> None:
    """Write the weight storages of a network to a safetensors file: LAYER/TENSOR, headers in its metadata."""
    found = storages(model)
    tensors = {
        f"{name}/{key}": value.contiguous() for name, item in found.items() for key, value in item.pack().items()
    }
    headers = json.dumps({name: item.header() for name, item in found.items()}, separators=(",", ":"))
    save_file(tensors, file, {"format": FORMAT, "version": str(VERSION), "headers": headers})


def load_storages(model: nn.Module, file: Path) -> None:
    """Give the layers the storages that save_storages() wrote. Raises UserError for a damaged or foreign file."""
    for name, (tensors, header) in read_storages(file).items():
        with readable(f"{file}, layer {name}"):
            check_seal(tensors, header, f"{file}, layer {name}")
            model.get_submodule(name).weight_storage = Packed(tensors, header)


def read_storages(file: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """(tensors, header) by layer."""
    with readable(str(file)), safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
            raise UserError(f"{file} holds no {FORMAT} of version {VERSION}")
        found = {name: ({}, header) for name, header in json.loads(metadata["headers"]).items()}
        for key in content.keys():  # noqa: SIM118 (not a dict)
            name, _, tensor = key.rpartition("/")
            found[name][0][tensor] = content.get_tensor(key)
    return found
