"""Tiny checkpoints in the formats of the releases, against a forward pass written here from their tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LLaDA2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dqbench.errors import UserError
from dqbench.text.checkpoints import CheckpointPipeline, load_language_model
from dqbench.text.networks import BidirectionalLlama, BidirectionalQwen2, token_logits
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.released import open_layers
from dqbench.text.schedulers import DreamScheduler, LLaDAScheduler
from dqbench.text.tokenizer import character_tokenizer

D, HEADS, FF, LAYERS, VOCAB, MASK, EOS = 32, 4, 48, 3, 104, 102, 101

LLADA = {  # the fields of LLaDA-8B's config.json
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "auto_map":
    {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": D, "embedding_dropout": 0.0,
    "embedding_size": VOCAB, "eos_token_id": EOS, "flash_attention": False, "include_bias": False, "include_qkv_bias":
    False, "init_device": "meta", "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "mask_token_id": MASK, "max_sequence_length": 64, "mlp_hidden_size": FF, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": LAYERS, "pad_token_id": EOS,
    "precision": "amp_bf16", "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0,
    "scale_logits": False, "use_cache": False, "vocab_size": VOCAB, "weight_tying": False,
}  # fmt: skip
DREAM = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": EOS, "eos_token_id": EOS, "hidden_act": "silu", "hidden_size": D, "initializer_range": 0.02,
    "intermediate_size": FF, "mask_token_id": MASK, "max_position_embeddings": 128, "max_window_layers": LAYERS,
    "model_type": "Dream", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": 2,
    "pad_token_id": EOS, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": VOCAB,
}  # fmt: skip
LLADA_NAMES = {
    "top": ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
    "block": "model.transformer.blocks.{}.",
    "parts": ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
}
NATIVE_NAMES = {
    "top": ("model.embed_tokens", "model.norm", "lm_head"),
    "block": "model.layers.{}.",
    "parts": (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
}  # fmt: skip
FORMATS = {"llada": (LLADA, LLADA_NAMES, HEADS, False), "Dream": (DREAM, NATIVE_NAMES, 2, True)}


def random_tensors(names: dict[str, Any], key_heads: int, biases: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = D // HEADS * key_heads
    shapes = [(D,), (D,), (D, D), (keys, D), (keys, D), (D, D), (FF, D), (FF, D), (D, FF)]
    tensors = dict(zip(names["top"], [(VOCAB, D), (D,), (VOCAB, D)], strict=True))
    for i in range(LAYERS):
        tensors |= {names["block"].format(i) + part: s for part, s in zip(names["parts"], shapes, strict=True)}
    named = {f"{name}.weight": shape for name, shape in tensors.items()}
    if biases:
        named |= {f"{name}.bias": shape[:1] for name, shape in tensors.items() if name[-6:-5] in "qkv"}
    return {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in named.items()}


def write(folder: Path, kind: str, shards: int = 3, **changes: Any) -> Path:
    """A released model's folder: config.json, safetensors in shards with their index, no tokenizer."""
    config, *shape = FORMATS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = random_tensors(*shape)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding on [B, H, L, E], halves as the pairs."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[-2]).float()[:, None] * (1.0 / theta ** (torch.arange(0, size, 2).float() / size))
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin


def reference(kind: str, ids: Tensor) -> Tensor:
    """Logits [B, L, V] of a Llama (Touvron et al. 2023) without a causal mask, from the stored tensors."""
    config, names, key_heads, biases = FORMATS[kind]
    tensors = random_tensors(names, key_heads, biases)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, D // HEADS).transpose(1, 2)

    embed, final, head = names["top"]
    x = tensors[f"{embed}.weight"][ids]
    for i in range(LAYERS):
        n1, n2, q, k, v, o, gate, up, down = (names["block"].format(i) + part for part in names["parts"])
        y = norm(x, tensors[f"{n1}.weight"], eps)
        query, key, value = heads(linear(y, q), HEADS), heads(linear(y, k), key_heads), heads(linear(y, v), key_heads)
        key, value = (part.repeat_interleave(HEADS // key_heads, 1) for part in (rotate(key, theta), value))
        mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        attended = F.scaled_dot_product_attention(rotate(query, theta), key, value, attn_mask=mask)
        x = x + linear(attended.transpose(1, 2).reshape(x.shape), o)
        y = norm(x, tensors[f"{n2}.weight"], eps)
        x = x + linear(F.silu(linear(y, gate)) * linear(y, up), down)
    return linear(norm(x, tensors[f"{final}.weight"], eps), head)


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_logits_are_bit_exact(tmp_path: Path, kind: str, shards: int) -> None:
    pipe = load_language_model(write(tmp_path, kind, shards))
    with torch.no_grad():
        logits, expected = pipe.model(input_ids=tokens()).logits, reference(kind, tokens())
        predicted = token_logits(pipe.model, tokens())
    assert (logits - expected).abs().max().item() == 0.0
    shifted = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    assert torch.equal(predicted, {"llada": expected, "Dream": shifted}[kind])


def test_the_pipeline_that_is_made(tmp_path: Path) -> None:
    """Network, sampler and special tokens of each release; without tokenizer files it takes token ids."""
    for kind, network, scheduler in (
        ("llada", BidirectionalLlama, LLaDAScheduler),
        ("Dream", BidirectionalQwen2, DreamScheduler),
    ):
        folder = write(tmp_path / kind, kind)
        pipe = CheckpointPipeline.from_pretrained(str(folder), dtype=torch.bfloat16, local_files_only=True)
        assert type(pipe.model) is network and type(pipe.scheduler) is scheduler and pipe.tokenizer is None
        assert {parameter.dtype for parameter in pipe.model.parameters()} == {torch.bfloat16}
        assert pipe.model.config.mask_token_id == MASK and pipe.scheduler.config.eos_token_id == EOS
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler(gen_length=4)
        out = pipe(tokens(), [torch.Generator().manual_seed(i) for i in range(2)], 2)
        assert out.sequences.shape == (2, 15) and not (out.generated == MASK).any()


def test_a_plain_llama_folder_with_tokenizer(tmp_path: Path) -> None:
    """mask_token_id may come from the tokenizer; what was saved as a pipeline is read as one."""
    tokenizer = character_tokenizer()
    pipe = load_language_model(write(tmp_path / "llada", "llada"))
    pipe.model.config.mask_token_id = None
    pipe.model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    made = load_language_model(tmp_path / "llama", torch.float32)
    assert made.model.config.mask_token_id == made.scheduler.config.mask_token_id == tokenizer.mask_token_id
    assert torch.equal(made.model(tokens()).logits, pipe.model(tokens()).logits)
    configure(tmp_path / "llama", mask_token_id=7)
    assert load_language_model(tmp_path / "llama").tokenizer.mask_token_id == 7
    made.save_pretrained(tmp_path / "pipeline")
    again = CheckpointPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32, local_files_only=True)
    assert torch.equal(again.model(tokens()).logits, pipe.model(tokens()).logits)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    folder = write(tmp_path, "llada", 1, weight_tying=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, folder / "model.safetensors")
    network = load_language_model(folder).model
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.equal(network.lm_head.weight, tensors["model.transformer.wte.weight"])


def test_one_decoder_layer_at_a_time(tmp_path: Path) -> None:
    """state(): what load_state_dict() of the native layer takes; only that layer's tensors are read."""
    checkpoint = open_layers(write(tmp_path, "llada"))
    assert checkpoint.config.num_hidden_layers == LAYERS
    stored = random_tensors(*FORMATS["llada"][1:])
    state = checkpoint.state("model.layers.1", torch.float16)
    layer = checkpoint.empty().model.layers[1]
    layer.load_state_dict(state, assign=True, strict=True)
    assert torch.equal(layer.mlp.down_proj.weight, stored["model.transformer.blocks.1.ff_out.weight"].half())
    assert len(state) == 9 and {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(parameter.is_meta for parameter in checkpoint.empty().parameters())
    assert len(checkpoint.state()) == 3 + 9 * LAYERS


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = SHARD, index: bool = True) -> None:
    """Change the tensors of a shard, and the index with them."""
    tensors = load_file(folder / file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, folder / file)
    if index:
        content = json.loads((folder / INDEX).read_text())
        names = {name: f for name, f in content["weight_map"].items() if name not in before - set(tensors)}
        content["weight_map"] = names | dict.fromkeys(set(tensors) - before, file)
        (folder / INDEX).write_text(json.dumps(content))


def cut_off(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def configure(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


FFN = "model.transformer.blocks.{}.ff_proj.weight"
DAMAGE = {
    "missing": (lambda f: edit(f, lambda t: t.pop(next(iter(t)))), "lacks 1 tensors of a BidirectionalLlama: "),
    "surplus": (lambda f: edit(f, lambda t: t.update(extra=torch.zeros(2))), "1 tensors that no llada has: extra"),
    "native": (
        lambda f: edit(f, lambda t: t.update({"lm_head.weight": torch.zeros(2)})),
        "no llada has: lm_head.weight",
    ),
    "layer": (
        lambda f: edit(f, lambda t: t.update({FFN.format(LAYERS): torch.zeros(FF, D)})),
        f"1 tensors that a BidirectionalLlama has not: model.layers.{LAYERS}.mlp.gate_proj.weight",
    ),
    "shape": (lambda f: edit(f, lambda t: t.update({k: v[:-1] for k, v in t.items()})), "its config.json needs"),
    "integers": (
        lambda f: edit(f, lambda t: t.update({k: v.int() for k, v in t.items()})),
        "I32 .* needs floating point",
    ),
    "unlisted": (
        lambda f: edit(f, lambda t: t.update(extra=torch.zeros(2)), index=False),
        "does not describe its files",
    ),
    "truncated": (lambda f: cut_off(f / SHARD, 2000), f"{SHARD} is missing or damaged"),
    "header": (lambda f: cut_off(f / SHARD, 5), f"{SHARD} is missing or damaged"),
    "no shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing or damaged"),
    "no weights": (lambda f: (f / INDEX).unlink(), "model.safetensors is missing or damaged"),
    "index": (lambda f: cut_off(f / INDEX, 100), f"{INDEX} cannot be read"),
    "outside": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}})),
        f"{INDEX} is damaged",
    ),
    "config": (lambda f: cut_off(f / "config.json", 50), "config.json cannot be read"),
    "field": (lambda f: configure(f, d_model="absent"), "config.json lacks 'd_model'"),
    "heads": (lambda f: configure(f, n_heads=5), "config.json describes no network"),
    "layers": (lambda f: configure(f, n_layers=10**6), "asks for 1000000 decoder layers; the folder holds 30 tensors"),
    "no heads": (lambda f: configure(f, n_heads=0), "config.json describes no network"),
    "negative": (lambda f: configure(f, mlp_hidden_size=-1), "config.json describes no network"),
    "padding": (
        lambda f: configure(f, pad_token_id=VOCAB),
        f"pad_token_id={VOCAB}; allowed: 0 to {VOCAB - 1}, or null",
    ),
    "end": (lambda f: configure(f, eos_token_id=[1, VOCAB]), f"eos_token_id={VOCAB}; allowed: 0 to {VOCAB - 1}"),
    "mask": (lambda f: configure(f, mask_token_id=[1]), r"mask_token_id=\[1\]; allowed: 0 to"),
    "base": (lambda f: configure(f, rope_theta=-1.0), "rope_theta=-1.0; allowed: above 0"),
    "far mask": (lambda f: configure(f, mask_token_id=VOCAB), f"mask_token_id={VOCAB}; allowed: 0 to"),
    "type": (lambda f: configure(f, model_type=["llada"]), "model_type .* is unknown"),
    "no mask": (lambda f: configure(f, mask_token_id="absent"), "mask_token_id=None"),
    "alibi": (lambda f: configure(f, alibi=True), "alibi=True, which the native network lacks; supported: False"),
    "unknown": (
        lambda f: configure(f, model_type="sdar", architectures=["SDARForCausalLM"]),
        r"model_type sdar \(SDARForCausalLM\) is unknown; read without remote code: llada, Dream, llama, qwen2",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version"'), "tokenizer.json cannot be read"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer in .* cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    change, line = DAMAGE[damage]
    folder = write(tmp_path, "llada")
    change(folder)
    for read in (load_language_model, CheckpointPipeline.check):
        with pytest.raises(UserError, match=line) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_tokenizers_itself_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    """With the tokenizer_config.json of a release, the library raises a plain Exception."""
    folder = write(tmp_path, "llada")
    character_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer in .* cannot be read"):
        CheckpointPipeline.check(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.transformer.blocks.1.q_proj.weight", "model.transformer.ff_out.weight"])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    folder = write(tmp_path, "llada")
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0, 0] = value
    save_file(tensors, file)
    checkpoint = open_layers(folder)
    native = checkpoint.family.native(name)
    for read in (checkpoint.load, lambda: list(checkpoint.pieces(native))):
        with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
            read()


def test_other_attention_than_dreams_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_sliding_window=True"):
        load_language_model(write(tmp_path, "Dream", use_sliding_window=True))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class TinyConfig(LlamaConfig):
    model_type = "{kind}"
class TinyModel(LlamaForCausalLM):
    config_class = TinyConfig
"""


@pytest.mark.parametrize("kind, pipeline", [("sdar", MaskedDiffusionPipeline), ("llada2_moe", LLaDA2Pipeline)])
def test_code_is_run_only_when_it_is_trusted(tmp_path: Path, monkeypatch: Any, kind: str, pipeline: type) -> None:
    """LLaDA-2's network goes into diffusers' own pipeline."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_language_model(write(tmp_path / "llada", "llada")).model.save_pretrained(tmp_path / kind)
    (tmp_path / kind / "modeling_tiny.py").write_text(CODE.format(kind=kind))
    classes = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    classes["AutoModelForCausalLM"] = classes["AutoModel"]
    configure(tmp_path / kind, model_type=kind, auto_map=classes)
    with pytest.raises(UserError, match=f"model_type {kind}"):
        load_language_model(tmp_path / kind)
    pipe = load_language_model(tmp_path / kind, trust_remote_code=True)
    assert type(pipe) is pipeline and type(pipe.model).__name__ == "TinyModel"
