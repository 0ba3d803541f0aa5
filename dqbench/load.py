"""A packed pipeline: checked, read, and run. docs/packed_format.md describes the folder.

python -m dqbench.load FOLDER [json=PATH]: check every file and layer, and say what the folder holds.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqbench.commands import command, split_json
from dqbench.config import Model, Sampler
from dqbench.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from dqbench.quant.storage import Packed

PACKED = "packed.safetensors"
KEYS = ("origin", "sampler", "denoiser", "sizes", "files")  # of a manifest, beside format and version
PARTS = ("layers", "state", "quantization")  # of the index of a packed file


def from_packed(path: Path | str, device: str = "cpu") -> DiffusionPipeline:
    """The quantized pipeline of a packed folder, with the outputs of the one that was packed.

    Raises UserError for a folder that is damaged, of another kind, or of another version.
    """
    import torch

    from dqbench.architectures import untrained
    from dqbench.models import attach_anatomy, fix_layout, locate
    from dqbench.quant.checkpoint import load_scheduler
    from dqbench.quant.packing import readable

    folder, manifest = Path(path), read_manifest(path)
    tensors, content = read_network(folder / manifest["denoiser"] / PACKED)
    with readable(f"{folder / manifest['denoiser'] / PACKED}"):
        model = Model(**content["quantization"]["model"])
        network = rebuild(untrained(folder, model.denoiser), tensors, content)
    parts = {"dtype": network.dtype, "local_files_only": True, model.denoiser: network}
    pipe = locate(model.pipeline).from_pretrained(folder, **parts).to(torch.device(device))
    pipe.scheduler = load_scheduler(folder / "scheduler" / "scheduler_config.json", pipe)  # some classes replace it
    pipe.set_progress_bar_config(disable=True)
    attach_anatomy(pipe, model)
    fix_layout(network)
    if manifest["sampler"] is not None:
        pipe.sampler = Sampler(**manifest["sampler"])
    return pipe


def rebuild(network: nn.Module, tensors: dict[str, Tensor], content: dict[str, Any]) -> nn.Module:
    """`network` with what a packed file holds, quantized and frozen."""
    from dqbench.quant.attach import freeze
    from dqbench.quant.checkpoint import install
    from dqbench.quant.compact import tie, unpack_state
    from dqbench.quant.storage import unpack

    install(network, content["quantization"])
    state = unpack_state(network, {name: value for name, value in tensors.items() if ":" not in name}, content["state"])
    for name, storage in packed_layers(tensors, content).items():
        network.get_submodule(name).weight_storage = storage
        state[f"{name}.weight"] = unpack(storage.tensors, storage.content)
    network.load_state_dict(state, assign=True)
    tie(network, content["state"].get("shared", {}))
    return freeze(network)


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a packed folder whose files are all as they were written. Raises UserError, one line, else."""
    from dqbench.quant.container import FORMAT, VERSION
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
    if missing := [key for key in KEYS if key not in manifest]:
        raise UserError(f"{folder} is no packed pipeline: its {MANIFEST} lacks {', '.join(missing)}")
    if damage := find_damage(folder):
        raise UserError(f"{folder} is truncated or altered: {damage}")
    return manifest


def read_network(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, content) of a packed file. Raises UserError for one that is damaged, older, or of another kind."""
    from dqbench.quant import container

    tensors, content = container.read(file)
    if missing := [part for part in PARTS if part not in content]:
        raise UserError(f"{file} holds no packed network: its index lacks {', '.join(missing)}")
    return tensors, content


def packed_layers(tensors: dict[str, Tensor], content: dict[str, Any]) -> dict[str, Packed]:
    """The weight storage of each layer of a packed file, whose checksum has been checked: sealed again."""
    from dqbench.quant.packing import seal
    from dqbench.quant.storage import Packed

    own: dict[str, dict[str, Tensor]] = {name: {} for name in content["layers"]}
    for name, value in tensors.items():
        layer, colon, key = name.rpartition(":")
        if colon:
            own[layer][key] = value
    return {name: Packed(own[name], seal(own[name], header)) for name, header in content["layers"].items()}


def held(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a packed folder holds: its origin, its sizes, and how many weights of each kind, all unpacked once."""
    from dqbench.quant.packing import readable
    from dqbench.quant.storage import unpack

    found: Counter[str] = Counter()
    file = folder / manifest["denoiser"] / PACKED
    parts = read_network(file)
    with readable(str(file)):
        for storage in packed_layers(*parts).values():
            unpack(storage.tensors, storage.content)
            found[kind_of(storage.content)] += 1
    return {"origin": manifest["origin"], "layers": dict(found), "sizes": manifest["sizes"]}


def kind_of(header: dict[str, Any]) -> str:
    """'uniform, 4 bits'; without bits where a kind has no one width."""
    bits = header.get("bits", header.get("n_bits"))
    return header["kind"] if bits is None else f"{header['kind']}, {bits} bits"


def lines(content: dict[str, Any]) -> list[str]:
    """A packed folder's content for people: where it is from, its layers, its sizes."""
    sizes, origin = content["sizes"], content["origin"]
    layers = ", ".join(f"{count} of {kind}" for kind, count in content["layers"].items())
    shown = [" ".join(f"{key}={value}" for key, value in origin.items() if not isinstance(value, dict))] * bool(origin)
    shown.append(f"packed weights: {layers}; {ratio(sizes['packed'], 'tensor_bytes')}")
    if sizes["unpacked"]:
        shown.append(f"planned, but not packed: {', '.join(sizes['unpacked'])}")
    shown.append(f"denoiser: {ratio(sizes['denoiser'], 'file_bytes')} on disk")
    tensors, disk = (sizes["denoiser"][key] for key in ("tensor_bytes", "file_bytes"))
    shown.append(f"of these, header and index: {disk - tensors:,} bytes")
    if (billed := sizes["billed_bytes"]) is not None:
        apart = f"its tensors {tensors / billed - 1:+.2%}, its file {disk / billed - 1:+.2%}"
        shown.append(f"its bill says {billed:,} bytes: {apart}")
    return shown


def ratio(size: dict[str, int], key: str) -> str:
    """'608,123 bytes, 0.1371 x the 4,435,456 in 32 bits,'."""
    return f"{size[key]:,} bytes, {size[key] / size['fp32_bytes']:.4f} x the {size['fp32_bytes']:,} in 32 bits,"


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
