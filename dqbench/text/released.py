"""The network in a released language model's folder: config.json and safetensors, one decoder layer or all at once.

open_layers() checks every name and shape from the files' headers; tensors are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dqbench.errors import UserError, one_line
from dqbench.text.families import FAMILIES, Family

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 2**22  # elements of a large tensor that are read at once
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them; 8-bit ones mean nothing without their scales
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A released model on disk. tensors: native name -> (file, name in it); nothing but headers has been read."""

    folder: Path
    family: Family
    config: PreTrainedConfig
    tensors: dict[str, tuple[Path, str]]

    def empty(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with parameters on the meta device and buffers in place."""
        with init_empty_weights(include_buffers=False):
            network = self.family.network(self.config).eval().requires_grad_(False)
        network.tie_weights()
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        return network

    def state(self, module: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The state dict of one native module, such as model.layers.3, as stored or in `dtype`."""
        prefix = f"{module}." if module else ""
        return {name.removeprefix(prefix): tensor for name, tensor in self.stream(prefix, dtype)}

    def stream(self, prefix: str = "", dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(native name, tensor) of all tensors that begin with `prefix`, read one at a time."""
        for name, (file, stored) in self.tensors.items():
            if name.startswith(prefix):
                with opened(file) as content:
                    tensor = finite(content.get_tensor(stored), file, stored)
                    yield name, tensor if dtype is None else tensor.to(dtype)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a tensor, as stored: [*ids.shape, ...]. Of the file no more is read than these."""
        file, stored = self.tensors[name]
        with opened(file) as content:
            return finite(content.get_tensor(stored)[ids], file, stored)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor, as stored, in runs of rows of about PIECE elements."""
        file, stored = self.tensors[name]
        with opened(file) as content:
            length, *rest = content.get_slice(stored).get_shape()
        size = max(1, PIECE // torch.Size(rest).numel())
        for first in range(0, length, size):
            yield self.rows(name, torch.arange(first, min(first + size, length)))

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The network, filled tensor by tensor."""
        network = self.empty()
        for name, tensor in self.stream(dtype=dtype):
            set_module_tensor_to_device(network, name, "cpu", value=tensor, dtype=tensor.dtype)
        network.tie_weights()
        return network


def open_layers(path: Path | str) -> Checkpoint:
    """The checkpoint in a folder, its names and shapes checked. Raises UserError for what cannot be read natively."""
    folder, content = Path(path), read_json(Path(path) / "config.json")
    if (family := FAMILIES.get(str(content.get("model_type")))) is None:
        raise UserError(unknown_architecture(folder, content))
    stored = stored_tensors(folder)
    if unknown := sorted(name for name in stored if family.native(name) is None):
        raise UserError(f"{folder} holds {len(unknown)} tensors that no {content['model_type']} has: {unknown[0]}, ...")
    tensors = {family.native(name): (file, name) for name, file in stored.items()}
    with describing(folder / "config.json"):
        checkpoint = Checkpoint(folder, family, family.config(content), tensors)
        check_config(checkpoint)
        network = checkpoint.empty()
    check_tensors(checkpoint, network)
    return checkpoint


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Inside: what a config.json that lacks or twists something makes a network raise becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{file} lacks {error}, which its model_type needs") from error
    except UNBUILDABLE as error:
        raise UserError(f"{file} describes no network: {one_line(error)[:160]}") from error


def check_config(checkpoint: Checkpoint) -> None:
    """Raise UserError for more layers than the tensors could fill, special tokens outside the vocabulary, no base."""
    file, config = checkpoint.folder / "config.json", checkpoint.config
    if not (base := config.rope_parameters["rope_theta"]) > 0:
        raise UserError(f"{file} has rope_theta={base}; allowed: above 0")
    if config.num_hidden_layers > len(checkpoint.tensors):
        held = f"the folder holds {len(checkpoint.tensors)} tensors"
        raise UserError(f"{file} asks for {config.num_hidden_layers} decoder layers; {held}")
    named = {key: getattr(config, key, None) for key in SPECIAL}
    tokens = {key: as_list(value) if key == "eos_token_id" else [value] for key, value in named.items()}
    for key, token in ((key, token) for key, own in tokens.items() for token in own if token is not None):
        if not (isinstance(token, int) and 0 <= token < config.vocab_size):
            raise UserError(f"{file} has {key}={token}; allowed: 0 to {config.vocab_size - 1}, or null")


def as_list(value: Any) -> list[Any]:
    """A list as it is, None as an empty one, anything else as one of it."""
    return value if isinstance(value, list) else [] if value is None else [value]


def unknown_architecture(folder: Path, content: Mapping[str, Any]) -> str:
    """One line: what the folder holds, and what can be read."""
    named = ", ".join(map(str, as_list(content.get("architectures")))) or "no architecture"
    return (
        f"{folder}: model_type {content.get('model_type')} ({named}) is unknown; read without remote code: "
        f"{', '.join(FAMILIES)}; in Python CheckpointPipeline.from_pretrained(..., trust_remote_code=True) "
        "runs the code that comes with it"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError where it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}); needed: a released model's folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; needed: a released model's folder")
    return content


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the files' headers; they must hold what the index says, where there is one."""
    if not (folder / INDEX).exists():
        return dict.fromkeys(tensor_names(folder / SINGLE), folder / SINGLE)
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(Path(str(file)).name == file for file in listed.values()):
        raise UserError(f"{folder / INDEX} is damaged; needed: weight_map, tensor names -> file names")
    found = {(name, file) for file in sorted(set(listed.values())) for name in tensor_names(folder / file)}
    if differing := sorted(found ^ set(listed.items())):
        name, file = differing[0]
        raise UserError(f"{folder / INDEX} does not describe its files: {name} in {file} is in one of the two only")
    return {name: folder / file for name, file in listed.items()}


def tensor_names(file: Path) -> list[str]:
    """The names in a safetensors file's header."""
    with opened(file) as content:
        return list(content.keys())


def opened(file: Path) -> Any:
    """A safetensors file to read; UserError where it is missing or cut off."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        line = f"{file} is missing or damaged ({one_line(error)}); needed: safetensors, fetched completely"
        raise UserError(line) from error


def finite(tensor: Tensor, file: Path, name: str) -> Tensor:
    """The tensor. Raises UserError where it holds NaN or infinities, as half-written and overflowed files do."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(f"{file}: {name} holds values that are not finite numbers; needed: an undamaged file")
    return tensor


def check_tensors(checkpoint: Checkpoint, network: nn.Module) -> None:
    """Raise UserError for missing, surplus and misshaped tensors of the empty `network`, before any is read."""
    needed = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    where, kind = checkpoint.folder, type(network).__name__
    if missing := sorted(needed.keys() - checkpoint.tensors.keys()):
        raise UserError(f"{where} lacks {len(missing)} tensors of a {kind}: {', '.join(missing[:3])}")
    if surplus := sorted(checkpoint.tensors.keys() - needed.keys()):
        raise UserError(f"{where} holds {len(surplus)} tensors that a {kind} has not: {', '.join(surplus[:3])}")
    for name, (file, stored) in checkpoint.tensors.items():
        with opened(file) as content:
            part = content.get_slice(stored)
        if tuple(part.get_shape()) != needed[name] or part.get_dtype() not in FLOATS:
            given = f"{part.get_dtype()} {part.get_shape()}"
            raise UserError(f"{file}: {stored} is {given}; its config.json needs floating point {list(needed[name])}")
