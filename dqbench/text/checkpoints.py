"""Released masked-diffusion language models as pipelines, without their code: the network (released.py), its authors'
sampler, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, DiffusionPipeline, LLaDA2Pipeline
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from dqbench.errors import UserError, one_line
from dqbench.text.families import FAMILIES
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.released import Checkpoint, as_list, open_layers, read_json
from dqbench.text.schedulers import LLaDAScheduler

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # what is fetched of a hub id
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
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
        there = Path(path).is_dir()
        folder = Path(path if there else cls.download(str(path), local_files_only, trust_remote_code))
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
    def download(cls, path: str, local_files_only: bool = False, code: bool = False) -> str:
        """The cached folder of a hub id; with its code where that is wanted."""
        patterns = [*FILES, "*.py"] if code else FILES
        return snapshot_download(path, allow_patterns=patterns, local_files_only=local_files_only)


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
