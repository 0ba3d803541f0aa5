"""Families of masked-diffusion language models: the native network that a config.json describes, its tensors' names.

In float32 the native networks give the releases' logits bit by bit. In bfloat16 LLaDA's may differ in their last bits:
its release turns q and k by their positions in float32 (rope_full_precision), transformers' Llama in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2TokenizerFast as Qwen2Tokenizer

from dqbench.errors import UserError
from dqbench.text.networks import BidirectionalLlama, BidirectionalQwen2
from dqbench.text.schedulers import DreamScheduler, LLaDAScheduler

LLADA_FIELDS = {
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "mlp_hidden_size": "intermediate_size", "max_sequence_length": "max_position_embeddings", "rope_theta":
    "rope_theta", "rms_norm_eps": "rms_norm_eps", "mask_token_id": "mask_token_id", "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}  # fmt: skip
LLADA_IS_LLAMA = {  # where LLaDA's config allows more than a Llama can do: what it must say
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False,
    "input_emb_norm": False, "scale_logits": False, "layer_norm_with_affine": True,
}  # fmt: skip
DREAM_IS_QWEN2 = {"use_sliding_window": False, "use_mrope": False, "rope_scaling": None}
LLADA_KEYS = (
    (r"model\.transformer\.wte\.(.*)", r"model.embed_tokens.\1"),
    (r"model\.transformer\.ln_f\.(.*)", r"model.norm.\1"),
    (r"model\.transformer\.ff_out\.(.*)", r"lm_head.\1"),
    (r"model\.transformer\.blocks\.(\d+)\.attn_norm\.(.*)", r"model.layers.\1.input_layernorm.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_norm\.(.*)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.([qkv])_proj\.(.*)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"model\.transformer\.blocks\.(\d+)\.attn_out\.(.*)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_proj\.(.*)", r"model.layers.\1.mlp.gate_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.up_proj\.(.*)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"model\.transformer\.blocks\.(\d+)\.ff_out\.(.*)", r"model.layers.\1.mlp.down_proj.\2"),
)


def llada_config(content: Mapping[str, Any]) -> LlamaConfig:
    """LLaDA's config.json as a Llama's."""
    check_values(content, LLADA_IS_LLAMA)
    fields = {ours: content[theirs] for theirs, ours in LLADA_FIELDS.items() if content.get(theirs) is not None}
    fields = {"intermediate_size": content.get("mlp_ratio", 4) * content["d_model"], "rms_norm_eps": 1e-5, **fields}
    key_heads = 1 if content.get("multi_query_attention") else content.get("n_kv_heads")
    vocabulary = content.get("embedding_size") or content["vocab_size"]
    return LlamaConfig(
        **fields, vocab_size=vocabulary, num_key_value_heads=key_heads or content["n_heads"], bos_token_id=None,
        tie_word_embeddings=content.get("weight_tying", True), shift_logits=False,
    )  # fmt: skip


def native_config(kind: type[PreTrainedConfig]) -> Callable[[Mapping[str, Any]], PreTrainedConfig]:
    """Reads a config.json that is already of a transformers kind; `shift_logits` is false where it is not named."""
    return lambda content: kind.from_dict({"shift_logits": False, **without_code(content)})


def dream_config(content: Mapping[str, Any]) -> Qwen2Config:
    """Dream's config.json as a Qwen2's, whose outputs predict the next token."""
    check_values(content, DREAM_IS_QWEN2)
    return Qwen2Config.from_dict({**without_code(content), "shift_logits": True})


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what names classes."""
    return {key: value for key, value in content.items() if key not in ("model_type", "architectures", "auto_map")}


def check_values(content: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raise UserError where a config.json asks for something that the native network does not do."""
    for key, value in needed.items():
        if content.get(key, value) != value:
            raise UserError(f"config.json has {key}={content[key]}, which the native network lacks; supported: {value}")


@dataclass(frozen=True)
class Family:
    """How a model_type is read. keys: (pattern, native name) of the tensors; none where the names are native."""

    network: type[nn.Module]
    config: Callable[[Mapping[str, Any]], PreTrainedConfig]
    scheduler: type
    tokenizer: Any
    keys: tuple[tuple[str, str], ...] = ()

    def native(self, name: str) -> str | None:
        """The native name of a tensor; None for one that the network has not."""
        if not self.keys:
            return name
        matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in self.keys)
        return next((match.expand(ours) for match, ours in matches if match), None)


FAMILIES = {
    "llada": Family(BidirectionalLlama, llada_config, LLaDAScheduler, PreTrainedTokenizerFast, LLADA_KEYS),
    "Dream": Family(BidirectionalQwen2, dream_config, DreamScheduler, Qwen2Tokenizer),
    "llama": Family(BidirectionalLlama, native_config(LlamaConfig), LLaDAScheduler, AutoTokenizer),
    "qwen2": Family(BidirectionalQwen2, native_config(Qwen2Config), LLaDAScheduler, AutoTokenizer),
}
