"""Released masked-diffusion language models, read without their code: config.json, safetensors, tokenizer files.

open_layers() checks every name and shape from the files' headers and reads tensors when they are asked for, one decoder
layer or the whole network; load_language_model() makes a pipeline of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from dqbench.config import one_line
from dqbench.errors import UserError
from dqbench.text.families import FAMILIES, Family
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # what is fetched of a hub id
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 2**22  # elements of a large tensor that are read at once
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
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
END_OF_TURN = "<|eot_id|>"  # LLaDA's
LLADA2 = "llada2"  # model types that begin so belong to diffusers' LLaDA2Pipeline


class CheckpointPipeline(MaskedDiffusionPipeline):
    """Loads what load_language_model() reads where a pipeline's class is named; a pipeline's own folder as well."""

    index = "config.json"  # the file that a released model's folder is known by

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **parts: Any,
    ) -> DiffusionPipeline:
        """The pipeline of a released model's folder or hub id; `parts` are of a pipeline's own folder only."""
        folder = Path(path) if Path(path).is_dir() else Path(cls.download(str(path), local_files_only=local_files_only))
        if (folder / "model_index.json").exists():
            return MaskedDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **parts)
        return load_language_model(folder, dtype, trust_remote_code)

    @staticmethod
    def architecture(folder: Path) -> dict[str, Any]:
        """The native network's config with `_class_name`; names and shapes of all tensors are checked by headers."""
        checkpoint = open_layers(folder)
        return {**checkpoint.config.to_dict(), "_class_name": checkpoint.family.network.__name__}

    @staticmethod
    def check(folder: Path) -> None:
        """Raise UserError where from_pretrained() would; nothing but headers and the tokenizer is read."""
        checkpoint = open_layers(folder)
        assemble(checkpoint, checkpoint.empty)

    @classmethod
    def download(cls, path: str, local_files_only: bool = False) -> str:
        """The cached folder of a hub id."""
        return snapshot_download(path, allow_patterns=FILES, local_files_only=local_files_only)


def load_language_model(
    path: Path | str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> DiffusionPipeline:
    """The pipeline of a released model's folder with its authors' sampler; without tokenizer files it takes token ids.

    trust_remote_code: run the code that comes with an unknown architecture; the known ones are read natively even so.
    """
    folder, content = Path(path), read_json(Path(path) / "config.json")
    if str(content.get("model_type")) not in FAMILIES and trust_remote_code:
        return load_by_its_own_code(folder, content, dtype)
    checkpoint = open_layers(folder)
    return assemble(checkpoint, lambda: checkpoint.load(dtype))


def assemble(checkpoint: Checkpoint, network: Callable[[], nn.Module]) -> MaskedDiffusionPipeline:
    """The pipeline of a checkpoint around `network()`, which is made once the config names the mask token."""
    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.family.tokenizer)
    name_mask(checkpoint, tokenizer)
    ends = as_list(checkpoint.config.eos_token_id)
    scheduler = checkpoint.family.scheduler(
        mask_token_id=checkpoint.config.mask_token_id,
        eos_token_id=ends[0] if ends else None,
        eot_token_id=None if tokenizer is None else tokenizer.get_vocab().get(END_OF_TURN),
    )
    return MaskedDiffusionPipeline(network(), scheduler, tokenizer)


def load_by_its_own_code(folder: Path, content: Mapping[str, Any], dtype: torch.dtype | None) -> DiffusionPipeline:
    """A pipeline around a network whose code comes with it; LLaDA-2's in diffusers' own pipeline."""
    is_llada2 = str(content.get("model_type")).startswith(LLADA2)
    network = (AutoModelForCausalLM if is_llada2 else AutoModel).from_pretrained(
        folder, dtype=dtype, trust_remote_code=True
    )
    tokenizer = read_tokenizer(folder, AutoTokenizer, trust_remote_code=True)
    network.eval().requires_grad_(False)
    if is_llada2:
        return LLaDA2Pipeline(network, BlockRefinementScheduler(), tokenizer)
    return MaskedDiffusionPipeline(network, LLaDAScheduler(), tokenizer)


def read_tokenizer(folder: Path, kind: Any, **options: Any) -> Any | None:
    """The tokenizer in the folder; None where its files are not there. Raises UserError for damaged ones."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        return None
    for file in [*files, folder / "tokenizer_config.json"]:
        if file.suffix == ".json" and file.exists():
            read_json(file)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # what tokenizers raises for a damaged file is of no narrower class
        raise UserError(f"the tokenizer in {folder} cannot be read: {one_line(error)[:160]}") from error


def name_mask(checkpoint: Checkpoint, tokenizer: Any | None) -> None:
    """Let config and tokenizer agree on the mask token; the config's counts. Raises UserError where none is named."""
    mask = getattr(checkpoint.config, "mask_token_id", None)
    mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
    if mask is None or not 0 <= mask < checkpoint.config.vocab_size:
        line = f"mask_token_id={mask}; a masked-diffusion model, unlike others, names one of its tokens"
        raise UserError(f"{checkpoint.folder / 'config.json'} has {line}")
    checkpoint.config.mask_token_id = mask
    if tokenizer is not None and tokenizer.mask_token_id != mask:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)


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
    """Raise UserError for more layers than the tensors could fill, and for special tokens outside the vocabulary."""
    file, config = checkpoint.folder / "config.json", checkpoint.config
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
        f"{', '.join(FAMILIES)}; trust_remote_code=True would run the code that comes with it"
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
