"""A packed pipeline: checked, read, and run. docs/packed_format.md describes the folder.

python -m dqbench.load FOLDER [json=PATH]: check every file and layer, and say what the folder holds.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqbench.config import Model, Sampler, command, split_json
from dqbench.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

FORMAT, VERSION = "dqbench.packed", 1
DESCRIPTION, PACKED, REST = "quantization.json", "packed.safetensors", "rest.safetensors"
Layers = dict[str, tuple[dict[str, "Tensor"], dict[str, Any]]]


def from_packed(path: Path | str, device: str = "cpu") -> DiffusionPipeline:
    """The quantized pipeline of a packed folder, with the outputs of the one that was packed.

    Raises UserError for a folder that is damaged, of another kind, or of another version.
    """
    import torch

    from dqbench.models import attach_anatomy, fix_layout, locate
    from dqbench.quant.checkpoint import load_scheduler

    folder, manifest = Path(path), read_manifest(path)
    description = json.loads((folder / DESCRIPTION).read_text())
    model = Model(**description["model"])
    network = rebuild(folder / model.denoiser, description)
    parts = {"dtype": network.dtype, "local_files_only": True, model.denoiser: network}
    pipe = locate(model.pipeline).from_pretrained(folder, **parts).to(torch.device(device))
    pipe.scheduler = load_scheduler(folder / "scheduler" / "scheduler_config.json", pipe)  # some classes replace it
    pipe.set_progress_bar_config(disable=True)
    attach_anatomy(pipe, model)
    fix_layout(network)
    if manifest["sampler"] is not None:
        pipe.sampler = Sampler(**manifest["sampler"])
    return pipe


def rebuild(folder: Path, description: dict[str, Any]) -> nn.Module:
    """The quantized network of a denoiser's folder, frozen. Raises UserError where the files do not fit each other."""
    from dqbench.models import locate
    from dqbench.quant.attach import freeze
    from dqbench.quant.checkpoint import install
    from dqbench.quant.compact import unpack_state
    from dqbench.quant.storage import Packed, unpack

    config = json.loads((folder / "config.json").read_text())
    network = locate(f"diffusers.{config['_class_name']}").from_config(config)
    install(network, description)
    state = unpack_state(network, *read_rest(folder / REST))
    for name, (tensors, header) in read_layers(folder / PACKED).items():
        network.get_submodule(name).weight_storage = Packed(tensors, header)
        state[f"{name}.weight"] = unpack(tensors, header)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder} does not hold what {DESCRIPTION} describes: {str(error)[:160]}") from error
    return freeze(network)


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a packed folder whose files are all as they were written. Raises UserError, one line, else."""
    from dqbench.quant.packing import check_seal
    from dqbench.stages import MANIFEST, find_damage

    folder, file = Path(path), Path(path) / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is no packed pipeline, {MANIFEST} is missing; python -m dqbench.export makes one")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is truncated or altered: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is no packed pipeline: its {MANIFEST} is not of format {FORMAT}")
    if manifest.get("version") != VERSION:
        raise UserError(f"{folder} has version {manifest.get('version')} of {FORMAT}; this dqbench reads {VERSION}")
    check_seal({}, manifest, str(file))
    if damage := find_damage(folder):
        raise UserError(f"{folder} is truncated or altered: {damage}")
    return manifest


def read_rest(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a denoiser's file of what is not packed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or altered: {' '.join(str(error).split())[:160]}") from error


def read_layers(file: Path) -> Layers:
    """(tensors, header) of each packed weight; unpack() checks them against their seal."""
    from dqbench.quant.storage import read_storages

    return read_storages(file)


def held(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a packed folder holds: its origin, its sizes, and how many weights of each kind, all unpacked once."""
    from dqbench.quant.storage import unpack

    found: Counter[str] = Counter()
    for tensors, header in read_layers(folder / manifest["denoiser"] / PACKED).values():
        unpack(tensors, header)
        bits = header.get("bits", header.get("n_bits"))
        found[f"{header['kind']}, {bits} bits"] += 1
    return {"origin": manifest["origin"], "layers": dict(found), "sizes": manifest["sizes"]}


def lines(content: dict[str, Any]) -> list[str]:
    """A packed folder's content for people: where it is from, its layers, its sizes."""
    sizes, origin = content["sizes"], content["origin"]
    layers = ", ".join(f"{count} of {kind}" for kind, count in content["layers"].items())
    shown = [" ".join(f"{key}={value}" for key, value in origin.items() if not isinstance(value, dict))] * bool(origin)
    shown.append(f"packed weights: {layers}; {ratio(sizes['packed'])}")
    if sizes["unpacked"]:
        shown.append(f"planned, but not packed: {', '.join(sizes['unpacked'])}")
    shown.append(f"denoiser: {ratio(sizes['denoiser'])}")
    overhead = sizes["denoiser"]["file_bytes"] - sizes["denoiser"]["tensor_bytes"]
    shown.append(f"of these, safetensors headers: {overhead:,} bytes")
    if (billed := sizes["billed_bytes"]) is not None:
        tensors = sizes["denoiser"]["tensor_bytes"]
        shown.append(f"its bill says {billed:,} bytes, its tensors take {tensors:,} ({tensors / billed - 1:+.2%})")
    return shown


def ratio(size: dict[str, int]) -> str:
    """'608,123 bytes on disk, 0.1371 x the 4,435,456 in 32 bits'."""
    part = size["file_bytes"] / size["fp32_bytes"]
    return f"{size['file_bytes']:,} bytes on disk, {part:.4f} x the {size['fp32_bytes']:,} in 32 bits"


@command
def main(argv: list[str]) -> None:
    """Check a packed folder and print what it holds; with json=PATH also write that there."""
    from dqbench.results import atomic_write

    given, target = split_json(argv)
    if len(given) != 1 or "=" in given[0]:
        raise UserError("allowed: FOLDER [json=PATH]")
    folder = Path(given[0])
    content = held(folder, read_manifest(folder))
    print("\n".join([f"{folder}: whole", *lines(content)]))
    if target:
        atomic_write(target, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
