"""A quantized denoiser on disk: its state dict, and a description of the quantizers that hang on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dqbench.architectures import untrained
from dqbench.config import Model
from dqbench.errors import UserError
from dqbench.models import anatomy, attach_anatomy, clone, denoiser, fix_layout, locate
from dqbench.quant.added_bias import restore_bias
from dqbench.quant.attach import attach_act_quantizer, freeze
from dqbench.quant.attention import QuantAttnProcessor, attention_layers
from dqbench.quant.clock import attach_clock, timesteps_of
from dqbench.quant.compact import tie, twins
from dqbench.quant.feature_cache import describe_caches, install_caches
from dqbench.quant.packing import readable
from dqbench.quant.plan import LayerBits
from dqbench.quant.quantizers import from_spec
from dqbench.quant.storage import load_storages, save_storages

DESCRIPTION, WEIGHTS, STORED = "quantization.json", "denoiser.safetensors", "weight_storage.safetensors"


def describe(model: nn.Module) -> dict[str, Any]:
    """What hangs on a quantized network: quantizers of activations and attention; its plan, added biases included."""
    acts = {
        name: {"site": layer.act_site, "spec": layer.act_quantizer.spec()}
        for name, layer in model.named_modules()
        if hasattr(layer, "act_quantizer")
    }
    attention = {
        name: {part: quantizer.spec() for part, quantizer in attn.processor.quantizers.items()}
        for name, attn in attention_layers(model).items()
        if isinstance(attn.processor, QuantAttnProcessor)
    }
    plan = {name: bits.described() for name, bits in getattr(model, "plan", {}).items()}
    return {
        "format": 2,
        "activations": acts,
        "attention": attention,
        "plan": plan,
        "timesteps": timesteps_of(model),
        "caches": describe_caches(model),
        "diagnostics": getattr(model, "diagnostics", {}),
    }


def install(model: nn.Module, description: dict[str, Any]) -> None:
    """Hang the described quantizers and added biases, still without values, on a full-precision network."""
    for name, item in description["activations"].items():
        attach_act_quantizer(model.get_submodule(name), from_spec(item["spec"]), item["site"])
    for name, parts in description["attention"].items():
        model.get_submodule(name).set_processor(
            QuantAttnProcessor({part: from_spec(spec) for part, spec in parts.items()})
        )
    model.plan = {name: LayerBits(**bits) for name, bits in description["plan"].items()}
    for name, bits in model.plan.items():
        restore_bias(model.get_submodule(name), bits.added_bias)
    model.diagnostics = description["diagnostics"]
    install_caches(model, description["caches"])
    if description["timesteps"]:
        attach_clock(model, description["timesteps"])


def save_denoiser(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the quantized denoiser, its weights as they are stored, and the scheduler's config to `folder`."""
    model = denoiser(pipe)
    save_storages(model, folder / STORED)
    shared = twins(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in shared}
    save_file(state, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(describe(model), indent=1))
    pipe.scheduler.save_pretrained(folder / "scheduler")


def load_denoiser(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """The quantized twin of the full-precision `pipe`, from what save_denoiser() wrote."""
    twin = clone(pipe)
    fill(denoiser(twin), folder / DESCRIPTION, folder / WEIGHTS)
    load_storages(denoiser(twin), folder / STORED)
    twin.scheduler = load_scheduler(folder / "scheduler" / "scheduler_config.json", pipe)
    return twin


def load_scheduler(file: Path, pipe: DiffusionPipeline) -> Any:
    """The scheduler that a scheduler_config.json describes."""
    config = json.loads(file.read_text())
    if "corrected" in config:
        from dqbench.correction import from_saved

        return from_saved(config)
    return scheduler_class(config["_class_name"], pipe).from_config(config)


def scheduler_class(name: str, pipe: DiffusionPipeline) -> type:
    """The scheduler class a config names: the pipeline's own, one of ours, or diffusers'."""
    import diffusers

    from dqbench import schedulers

    return (
        type(pipe.scheduler)
        if name == type(pipe.scheduler).__name__
        else getattr(schedulers, name, None) or getattr(diffusers, name)
    )


def fill(model: nn.Module, description: Path, weights: Path) -> None:
    """Install the described quantizers and load every tensor, strictly; then freeze."""
    with readable(str(description)):
        install(model, json.loads(description.read_text()))
    device, shared = next(model.parameters()).device, twins(model)
    try:
        state = load_file(weights)
        model.load_state_dict({**state, **{name: state[first] for name, first in shared.items()}}, assign=True)
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{weights} does not hold the quantized denoiser described beside it: {reason}") from error
    tie(model, shared)
    freeze(model.to(device))


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a quantized pipeline as a diffusers folder plus quantization.json; load_pipeline() reads it."""
    pipe.save_pretrained(folder, safe_serialization=True)
    save_storages(denoiser(pipe), folder / STORED)
    content = {**describe(denoiser(pipe)), "model": asdict(anatomy(pipe))}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1))


def load_pipeline(folder: Path | str, device: str = "cpu") -> DiffusionPipeline:
    """The quantized pipeline that save_pipeline() wrote, with identical outputs; UserError for another folder."""
    folder = Path(folder)
    if not (file := folder / DESCRIPTION).exists():
        raise UserError(f"{folder} holds no quantized pipeline: {DESCRIPTION} is missing")
    with readable(str(folder)):
        model = Model(**json.loads(file.read_text())["model"])
        cls = locate(model.pipeline)
        network = folder / model.denoiser
        quantized = untrained(folder, model.denoiser)
        fill(quantized, file, sorted(network.glob("*.safetensors"))[0])
        load_storages(quantized, folder / STORED)
    pipe = cls.from_pretrained(folder, local_files_only=True, **{model.denoiser: quantized})
    pipe.scheduler = load_scheduler(folder / "scheduler" / "scheduler_config.json", pipe)  # some classes replace it
    pipe.to(torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    attach_anatomy(pipe, model)
    fix_layout(quantized)
    return pipe
