"""Load a diffusers pipeline, and say what is special about its family (its anatomy)."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel, VQModel
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.logging import disable_progress_bar
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from dqbench.config import Model
from dqbench.errors import UserError
from dqbench.stages import sha256

disable_progress_bar()  # of loading components; the stages have their own

ZOO = Path(__file__).parent / "zoo"
UNIT_CLASSES = ("ResnetBlock2D", "Attention")
BLOCKS = ("TransformerBlock", "DecoderLayer")  # what the classes of all transformer blocks end in


class UnconditionalPipeline(DiffusionPipeline):
    """Unconditional sampling with any diffusers scheduler, in pixels or in the latents of a VAE.

    diffusers' own DDPM, DDIM and LDM pipelines each fix the scheduler, or drop `eta` or the generators on the way to
    `scheduler.step`; this one hands on whatever the scheduler's `step` takes, as the Stable Diffusion pipeline does.
    """

    _optional_components = ["vqvae"]

    def __init__(self, unet: UNet2DModel, scheduler: Any, vqvae: VQModel | AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)

    @torch.no_grad()
    def __call__(
        self,
        generator: Sequence[torch.Generator],
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "np",
    ) -> ImagePipelineOutput:
        """Sample len(generator) images in [0, 1]: "np" [B, H, W, C] or "pt" [B, C, H, W]."""
        return self._sample(generator, num_inference_steps, eta, output_type, self._predict)

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t).sample

    def _sample(
        self,
        generator: Sequence[torch.Generator],
        num_inference_steps: int,
        eta: float,
        output_type: str,
        predict: Callable[[Tensor, Tensor], Tensor],
    ) -> ImagePipelineOutput:
        config, device = self.unet.config, self._execution_device
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        shape = (len(generator), config.in_channels, *size)
        x_t = randn_tensor(shape, generator=list(generator), device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x_t = x_t * self.scheduler.init_noise_sigma
        extra = {"eta": eta, "generator": list(generator)}
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {key: value for key, value in extra.items() if key in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            eps = predict(self.scheduler.scale_model_input(x_t, t), t)
            x_t = self.scheduler.step(eps, t, x_t, **extra).prev_sample
        return ImagePipelineOutput(self._images(x_t, output_type))

    def _images(self, x_0: Tensor, output_type: str) -> Any:
        if self.vqvae is not None:
            x_0 = self.vqvae.decode(x_0 / getattr(self.vqvae.config, "scaling_factor", 1.0)).sample
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.float().cpu().permute(0, 2, 3, 1).numpy()


def resolve(model: Model) -> str:
    """The folder or hub id behind `model.path`. Raises UserError where `zoo:NAME` or a folder does not exist."""
    if model.path.startswith("zoo:"):
        folder = ZOO / model.path.removeprefix("zoo:")
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.parent.name for path in ZOO.glob("*/model_index.json")))
            raise UserError(f"model.path={model.path}: no such miniature; shipped: {shipped}")
        return str(folder)
    looks_local = model.path.startswith((".", "/", "~")) or os.sep != "/" and os.sep in model.path
    folder = Path(model.path).expanduser()
    known_by = {"model_index.json", getattr(locate(model.pipeline), "index", "model_index.json")}
    if folder.is_dir() and not any((folder / name).exists() for name in known_by):
        missing = folder / min(known_by)
        raise UserError(f"model.path={model.path} holds no model that {model.pipeline} reads; {missing} is missing")
    if folder.is_file():
        raise UserError(f"model.path={model.path} is a file; give the folder with config.json and safetensors")
    if looks_local and not folder.is_dir():
        raise UserError(f"model.path={model.path}: no such folder; give a diffusers folder or a hub id")
    return str(folder) if folder.is_dir() else model.path


def snapshot(model: Model) -> str:
    """The pipeline's folder on this machine; a hub id is fetched where it is not cached and the hub may be asked."""
    path = resolve(model)
    if Path(path).is_dir():
        return path
    try:
        return str(locate(model.pipeline).download(path, local_files_only=offline()))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(missing_checkpoint(model, path, error)) from error


def load(model: Model, device: str = "cpu") -> DiffusionPipeline:
    """The full-precision pipeline of `model` in eval mode, without gradients, its anatomy attached."""
    path = resolve(model)
    try:
        pipe = locate(model.pipeline).from_pretrained(
            path, dtype=getattr(torch, model.dtype), local_files_only=offline()
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(missing_checkpoint(model, path, error)) from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:  # it would turn some samples black; no paper scores with it
        pipe.register_modules(safety_checker=None)
    attach_anatomy(pipe, model)
    denoiser(pipe).requires_grad_(False).eval()
    fix_layout(denoiser(pipe))
    return pipe


def fix_layout(network: nn.Module) -> None:
    """Make upsampling see contiguous inputs at every batch size, not only from 64 on as diffusers does.

    The next conv then runs the same kernel whatever the batch: rounding differences of 1e-6 would flip codes later.
    """
    for module in network.modules():
        if isinstance(module, Upsample2D) and _contiguous not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


def missing_checkpoint(model: Model, path: str, error: Exception) -> str:
    """One line: which checkpoint could not be loaded, why, and how to provide it."""
    reason = " ".join(str(error).split())[:160]
    if Path(path).is_dir():
        return f"model {model.name}: the pipeline in {path} cannot be loaded: {reason}"
    return (
        f"model {model.name}: {path}/model_index.json was not found on the hub or in its cache ({reason}); "
        f"download it with `hf download {path}`, or give a diffusers folder as model.path=FOLDER"
    )


def offline() -> bool:
    """Whether the hub must not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def locate(name: str) -> type:
    """The class behind a dotted name; UserError where there is none."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name} is not an importable class ({error})") from error


def attach_anatomy(pipe: DiffusionPipeline, model: Model) -> None:
    """Let the pipeline carry its family's patterns, so that a method needs nothing else."""
    pipe.anatomy = model


def anatomy(pipe: DiffusionPipeline) -> Model:
    """The family's patterns; for a pipeline made in memory, those of diffusers' usual names."""
    if (model := getattr(pipe, "anatomy", None)) is not None:
        return model
    name = next(name for name in ("unet", "transformer", "model") if getattr(pipe, name, None) is not None)
    kind = type(pipe)
    return Model(
        name=kind.__name__, path="", version=0, pipeline=f"{kind.__module__}.{kind.__qualname__}", denoiser=name,
        dtype="float32", data=None, prompts=None, num_classes=None, units=default_units(getattr(pipe, name)),
        official_order=[], shortcuts=["up_blocks.*.conv_shortcut"], architecture={}, inputs={},
        time_embedding=["time_embedding.*", "*.time_emb_proj"],
    )  # fmt: skip


def default_units(network: nn.Module) -> list[str]:
    """Reconstruction units by class: residual blocks, transformer blocks, attentions outside of them."""
    kinds = {name: type(module).__name__ for name, module in network.named_modules()}
    return [name for name, kind in kinds.items() if kind in UNIT_CLASSES or kind.endswith(BLOCKS)]


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The network that is quantized."""
    return getattr(pipe, anatomy(pipe).denoiser)


def clone(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with a denoiser and a scheduler of its own; text encoders and VAE are shared with `pipe`."""
    twin = copy.copy(pipe)
    name = anatomy(pipe).denoiser
    setattr(twin, name, copy.deepcopy(getattr(pipe, name)).requires_grad_(False).eval())
    fix_layout(getattr(twin, name))
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def architecture(model: Model) -> dict[str, Any]:
    """The denoiser's config with `_class_name`: from the checkpoint's folder, else from the model's YAML."""
    try:
        folder = Path(resolve(model))
    except UserError:
        if not model.architecture:
            raise
        return dict(model.architecture)
    if is_released(folder, model):
        return locate(model.pipeline).architecture(folder)
    file = folder / model.denoiser / "config.json"
    if file.exists():
        return json.loads(file.read_text())
    if not model.architecture:
        raise UserError(f"model {model.name}: neither model.architecture nor {file} is there")
    return dict(model.architecture)


def is_released(folder: Path, model: Model) -> bool:
    """Whether a folder holds a model as its authors released it, not a diffusers pipeline."""
    return hasattr(locate(model.pipeline), "index") and folder.is_dir() and not (folder / "model_index.json").exists()


def input_shapes(model: Model, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of one denoiser call without the batch dimension: `model.inputs`, as wide as the denoiser's `config` says.

    A checkpoint given as model.path may have another size than the one whose YAML it borrows.
    """
    shapes = {name: list(shape) for name, shape in model.inputs.items()}
    size, channels, width = (config.get(key) for key in ("sample_size", "in_channels", "cross_attention_dim"))
    if name := next((name for name in ("sample", "hidden_states") if len(shapes.get(name, ())) == 3), None):
        sides = [size] * 2 if isinstance(size, int) else list(size or shapes[name][1:])
        shapes[name] = [channels or shapes[name][0], *sides]
    if "encoder_hidden_states" in shapes and isinstance(width, int):
        shapes["encoder_hidden_states"][-1] = width
    return shapes


def checkpoint_hash(model: Model) -> str:
    """SHA-256 over the names and contents of a pipeline folder; a hub id is hashed by its cached snapshot's commit."""
    path = snapshot(model)
    if not Path(resolve(model)).is_dir():
        return Path(path).name
    total = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.suffix in {".safetensors", ".json", ".bin", ".txt", ".model", ".jinja"}:
            total.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def conditions(model: Model, indices: Sequence[int]) -> dict[str, list[Any]]:
    """What the pipeline is conditioned on for samples `indices`: class i mod num_classes, prompt i mod their number."""
    if model.num_classes:
        return {"class_labels": [i % model.num_classes for i in indices]}
    lines = read_prompts(model)
    return {"prompt": [lines[i % len(lines)] for i in indices]} if lines else {}


def read_prompts(model: Model) -> list[str]:
    """The lines of model.prompts; none where it is not set. Raises UserError for a missing or empty file."""
    if model.prompts is None:
        return []
    file = Path(model.prompts).expanduser()
    if not file.is_file() or not (lines := file.read_text().splitlines()):
        raise UserError(f"model.prompts={model.prompts}: missing or empty; give a text file with one prompt per line")
    return lines
