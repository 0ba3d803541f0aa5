"""What a quantized weight is on disk: a layer's `weight_storage` holds compact tensors and a header that rebuild it.

A method sets `layer.weight_storage` to anything with pack() and header(), usually a Packed. header()["kind"] names the
function of KINDS that rebuilds the weight, bit-equal to layer.weight. The header is JSON and sealed: packing.seal().
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant.packing import check_seal, nbytes, seal

FORMAT, VERSION = "dqbench.weight_storage", 1
KINDS = {  # kind of a weight storage -> the function (tensors, header) -> weight
    "two_stage": "dqbench.quant.residual_weights:unpack",
    "block_format": "dqbench.quant.block_weights:unpack",
    "uniform": "dqbench.quant.uniform:unpack",
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
    return pkgutil.resolve_name(KINDS[kind])(tensors, header)


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
        check_seal(tensors, header, f"{file}, layer {name}")
        model.get_submodule(name).weight_storage = Packed(tensors, header)


def read_storages(file: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """(tensors, header) by layer."""
    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                raise UserError(f"{file} holds no {FORMAT} of version {VERSION}")
            found = {name: ({}, header) for name, header in json.loads(metadata["headers"]).items()}
            for key in content.keys():  # noqa: SIM118 (not a dict)
                name, _, tensor = key.rpartition("/")
                found[name][0][tensor] = content.get_tensor(key)
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is truncated or altered: {' '.join(str(error).split())[:160]}") from error
    return found
