"""What can be known to fail before a network is loaded: device, checkpoint, scheduler."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from dqbench import processes
from dqbench.config import Model, Sampler
from dqbench.errors import UserError

WEIGHTS = ("*.safetensors", "*.bin")


def preflight(model: Model, sampler: Sampler, device: str) -> Any:
    """The sampler's scheduler on the checkpoint's noise schedule; UserError where the cell could not start.

    Reads headers only; fetches a hub checkpoint that is not here.
    """
    from dqbench.models import is_released, locate, snapshot
    from dqbench.schedulers import make_scheduler

    choose_device(device)
    check_call(model, sampler)
    folder = Path(snapshot(model))
    if is_released(folder, model):
        locate(model.pipeline).check(folder)
        return make_scheduler({}, sampler)
    scheduler = scheduler_of(folder, model, sampler)
    check_weights(folder, model)
    return scheduler


def check_call(model: Model, sampler: Sampler) -> None:
    """Raise UserError for settings that the pipeline class would not take: they would be dropped without a word."""
    from dqbench.models import locate

    cls = locate(model.pipeline)
    accepted = inspect.signature(cls.__call__).parameters
    if "generator" not in accepted:  # a base class that loads whatever the folder names
        return
    for key, given, argument in (
        (f"sampler.guidance={sampler.guidance}", sampler.guidance != 1, "guidance_scale"),
        (f"sampler.eta={sampler.eta}", sampler.eta > 0, "eta"),
        (f"model.num_classes={model.num_classes}", model.num_classes is not None, "class_labels"),
        (f"model.prompts={model.prompts}", model.prompts is not None, "prompt"),
    ):
        if given and argument not in accepted:
            raise UserError(
                f"{key} has no effect on {model.pipeline}, which takes no {argument}; leave it at its default"
            )


def choose_device(wanted: str) -> str:
    """The device that runtime.device asks for: `auto` is CUDA where there is one; several processes have one each."""
    import torch

    count = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if count and os.environ.get("ACCELERATE_USE_CPU") != "True" else "cpu"
    if not (match := re.fullmatch(r"cpu|cuda(?::(\d+))?", wanted)):
        raise UserError(f"runtime.device={wanted} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if wanted != "cpu" and int(match[1] or 0) >= count:
        there = ", ".join(["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))])
        sees = f"torch {torch.__version__} sees {count or 'no'} CUDA devices"
        raise UserError(f"runtime.device={wanted}: {sees}; allowed: {there}")
    return wanted if wanted == "cpu" or processes.launched() == 1 else own_gpu(wanted, count)


def meet(wanted: str) -> None:
    """Join the other processes that accelerate has started, if any, on the device that runtime.device asks for."""
    if processes.launched() > 1:
        processes.join(choose_device(wanted))


def own_gpu(wanted: str, count: int) -> str:
    """The GPU of this one of several processes."""
    if wanted != "cuda":
        raise UserError(f"runtime.device={wanted} is one GPU for {processes.launched()} processes; allowed: auto, cuda")
    if processes.launched() > count:
        allowed = f"--num_processes {count} or fewer, or runtime.device=cpu"
        raise UserError(f"{processes.launched()} processes need as many GPUs, {count} are here; allowed: {allowed}")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def scheduler_of(folder: Path, model: Model, sampler: Sampler) -> Any:
    """The sampler's scheduler; UserError where the sampler does not go with the checkpoint's noise schedule."""
    from dqbench.schedulers import make_scheduler

    components = read_json(folder / "model_index.json")
    if "scheduler" not in components or model.denoiser not in components:
        file = folder / "model_index.json"
        raise UserError(f"{file} names no scheduler or no {model.denoiser}; model.denoiser must be one of its parts")
    return make_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"), sampler)


def check_weights(folder: Path, model: Model) -> None:
    """Raise UserError where weights are missing or a safetensors file is cut off or no such file."""
    from safetensors import SafetensorError, safe_open

    files = [file for pattern in WEIGHTS for file in (folder / model.denoiser).glob(pattern)]
    if not files:
        where = folder / model.denoiser
        raise UserError(f"model.path={model.path}: {where} holds no weights; needed: a .safetensors file")
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, "numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); fetch or convert it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """A checkpoint's JSON file; a UserError names it where it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        line = f"{file} cannot be read ({type(error).__name__}); needed: a diffusers pipeline folder"
        raise UserError(line) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; needed: a diffusers pipeline folder")
    return content
