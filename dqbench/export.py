"""A packed pipeline: a diffusers folder whose weights are codes. docs/packed_format.md describes it.

python -m dqbench.export run_id=ID [results=DIR] [to=FOLDER] [layout=plain|torchao] [json=PATH]: of a finished run.
python -m dqbench.export model=NAME model.path=FOLDER method=NAME ... to=FOLDER [json=PATH]: of a released language
model, quantized layer by layer, so that it need not fit into memory; the other arguments are those of dqbench.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dqbench.commands import command, split_json
from dqbench.config import Config, compose
from dqbench.errors import UserError, check_choice
from dqbench.identity import ADDED, plain
from dqbench.launching.checks import check
from dqbench.load import PACKED, held, lines, read_manifest
from dqbench.results import Row, atomic_write, rows, select

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from dqbench.quant.container import Writer
    from dqbench.run import Cell, Quantized

ARGUMENTS = ("run_id", "results", "to", "layout")
USAGE = "allowed: run_id=ID [results=DIR] [to=FOLDER] [layout=plain|torchao] [json=PATH]"
STREAMED = "allowed: model=NAME, other overrides as for python -m dqbench, to=FOLDER [json=PATH]"
LAYOUTS = ("plain", "torchao")  # torchao: its own form of linear weights beside the packed ones


def save_packed(
    pipe: DiffusionPipeline,
    folder: Path | str,
    origin: Mapping[str, Any] | None = None,
    billed: int | None = None,
    layout: str = "plain",
) -> dict[str, Any]:
    """Write a quantized pipeline to a new folder that load.from_packed() reads; returns the manifest.

    origin: JSON-able, where it comes from; billed: bytes of the denoiser by its bill. The folder appears when complete.
    """
    from dqbench.models import anatomy, denoiser
    from dqbench.quant.storage import storages
    from dqbench.torchao_layout import save_torchao

    network, model, folder = denoiser(pipe), anatomy(pipe), Path(folder)
    check_choice("layout", layout, LAYOUTS)
    if not storages(network):
        raise UserError("there is nothing to pack: no weight of the denoiser is quantized")
    with appearing(folder) as part:
        save_components(pipe, model.denoiser, part)
        found = save_network(network, asdict(model), part / model.denoiser / PACKED)
        if layout == "torchao":
            save_torchao(network, part / model.denoiser / "torchao.safetensors")
        sampler = getattr(pipe, "sampler", None)
        content = {"origin": dict(origin or {}), "sampler": sampler and asdict(sampler), "denoiser": model.denoiser}
        write_manifest(part, content | {"sizes": found | {"billed_bytes": billed}})
    return read_manifest(folder)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write to; it takes the name when the block ends well, else it is deleted.

    What a killed attempt left is deleted first. Raises UserError where the name is taken.
    """
    check_free(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise UserError where there is a file or folder of this name."""
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or give another one as to=FOLDER")


def save_components(pipe: DiffusionPipeline, denoiser: str, folder: Path) -> None:
    """All of a diffusers folder but the denoiser's weights: VAE, text encoder, tokenizer and scheduler are copied."""
    pipe.save_config(folder)
    for name, component in pipe.components.items():
        if name == denoiser and hasattr(component, "save_config"):
            component.save_config(folder / name)
        elif name == denoiser:  # of transformers
            component.config.save_pretrained(folder / name)
        elif component is not None:
            component.save_pretrained(folder / name)


def save_network(network: nn.Module, model: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Everything of the denoiser but its architecture, in one file: load.rebuild() reads it. model: its anatomy.

    Returns its sizes(). Raises UserError where a weight is no longer what its storage holds.
    """
    from dqbench.quant import container
    from dqbench.quant.compact import pack_state

    with container.Writer(file) as writer:
        headers = put_weights(writer, network)
        rest, state = pack_state(network)
        for name, tensor in rest.items():
            writer.add(name, tensor)
        writer.complete({"layers": headers, "state": state, "quantization": describe(network, model)})
    return sizes(network, headers, writer.described, file)


def put_weights(writer: Writer, module: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Write the weights of the quantized layers of `module`, whose own name is `prefix`; their headers by layer."""
    from dqbench.quant.packing import without_seal
    from dqbench.quant.storage import recast, storages

    headers = {}
    for inner, storage in storages(module).items():
        name = prefix + inner
        own = recast(storage, module.get_submodule(inner).weight, name)
        headers[name] = without_seal(own.content)
        for key, value in own.tensors.items():
            writer.add(f"{name}:{key}", value)
    return headers


def describe(network: nn.Module, model: Mapping[str, Any]) -> dict[str, Any]:
    """What hangs on the network, and its anatomy."""
    from dqbench.quant import checkpoint

    return {**checkpoint.describe(network), "diagnostics": {}, "model": model}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Format, version, content and the checksums of all files, sealed."""
    from dqbench.quant.container import FORMAT, VERSION
    from dqbench.quant.packing import seal
    from dqbench.stages import MANIFEST, checksums

    manifest = {"format": FORMAT, "version": VERSION, **content, "files": checksums(folder)}
    (folder / MANIFEST).write_text(json.dumps(seal({}, manifest), indent=1))


def sizes(network: nn.Module, headers: Mapping[str, Any], described: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Bytes of packed weights and of the whole denoiser: in 32 bits, of the stored tensors, and of the file.

    headers: of the packed weights; described: name -> (dtype, shape) of all tensors of the file. unpacked: planned
    weights that no storage holds, in full precision therefore.
    """
    stored = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in described.items()}
    plan = getattr(network, "plan", {})
    return {
        "packed": {
            "fp32_bytes": 4 * sum(prod(header["shape"]) for header in headers.values()),
            "tensor_bytes": sum(size for name, size in stored.items() if ":" in name),
        },
        "denoiser": {
            "fp32_bytes": 4 * sum(parameter.numel() for parameter in network.parameters()),
            "tensor_bytes": sum(stored.values()),
            "file_bytes": file.stat().st_size,
        },
        "unpacked": [name for name, own in plan.items() if 0 < own.weight < 32 and name not in headers],
    }


def export(row: Row, results: Path, folder: Path, layout: str = "plain") -> dict[str, Any]:
    """Pack the pipeline of a finished run; returns the manifest. Stages that the cache has lost are computed again."""
    from dqbench.run import Cell
    from dqbench.stages import taking_turns

    check_free(folder)
    cell = Cell(config_of(row, results))
    method = row.config["method"]["name"]
    with taking_turns(cell.store.root, f"packed-{row.run_id}"):
        there = set(cell.store.root.glob("*/*"))
        quantized = cell.quantize(cell.calibrate())
        if quantized.denoiser is None:
            raise UserError(f"run {row.run_id} is {method}: there is nothing to pack; allowed: a run that quantizes")
        if lost := [name for name, part in quantized.parts.items() if part.folder not in there]:
            commit = row.provenance.get("git_commit")
            print(f"no longer in the cache, computed again by this code (the row's is {commit}): {', '.join(lost)}")
        origin = origin_of(row, cell, quantized)
        return save_packed(cell.load(quantized), folder, origin, row.cost["size_bytes"], layout)


def origin_of(row: Row, cell: Cell, quantized: Quantized) -> dict[str, Any]:
    """Where a packed pipeline comes from."""
    from dqbench.provenance import version

    return {
        "run_id": row.run_id,
        "model": cell.model.name,
        "method": row.config["method"]["name"],
        "bits": row.config["bits"],
        "seed": cell.seed,
        "checkpoint": cell.origin["checkpoint"],
        "artifacts": {name: part.key for name, part in quantized.parts.items()},
        "dqbench": version("dqbench"),
        "git_commit": quantized.denoiser.stamp.get("git_commit"),
    }


def config_of(row: Row, results: Path) -> DictConfig:
    """The config of a run: what its row holds, with paths below `results` and defaults for all that no result needs."""
    default = compose([f"paths.results={results}", "metrics=none", "tracking=none"])
    content = {key: plain(default[key]) for key in ("metrics", "tracking", "paths", "runtime", "sampler", "scale")}
    own = {key: value for key, value in row.config.items() if key != "metrics"}
    own["sampler"] = content["sampler"] | own["sampler"]  # how many samples at once is not in a row
    own |= {group: dict.fromkeys(keys) | own[group] for group, keys in ADDED.items()}
    return OmegaConf.merge(OmegaConf.structured(Config), content | own)


def read_arguments(argv: list[str]) -> dict[str, str]:
    """Values by name, where a finished run is packed. Raises UserError for anything else."""
    given = dict(pair.partition("=")[::2] for pair in argv)
    if unknown := [pair for pair in argv if pair.partition("=")[0] not in ARGUMENTS]:
        raise UserError(f"{unknown[0]} is unknown; {USAGE}")
    if not all(given.values()) or "run_id" not in given:
        raise UserError(f"run_id=ID is missing, or a value is; {USAGE}")
    check_choice("layout", given.setdefault("layout", "plain"), LAYOUTS)
    return given


def export_run(argv: list[str]) -> tuple[Path, dict[str, Any]]:
    """Pack a finished run: (the folder, what it holds)."""
    given = read_arguments(argv)
    results = Path(given.get("results", "results"))
    (row,) = select(rows(results), [given["run_id"]], str(results))
    folder = Path(given.get("to", results / "runs" / row.run_id / "packed"))
    return folder, held(folder, export(row, results, folder, given["layout"]))


def export_checkpoint(argv: list[str]) -> tuple[Path, dict[str, Any]]:
    """Quantize and pack a released checkpoint, layer by layer: (the folder, what it holds)."""
    targets = [pair.removeprefix("to=") for pair in argv if pair.startswith("to=")]
    if not targets or not targets[-1]:
        raise UserError(f"to=FOLDER is missing: where the packed checkpoint goes; {STREAMED}")
    if other := [pair for pair in argv if pair.partition("=")[0] in ("run_id", "results", "layout")]:
        raise UserError(f"{other[0]} belongs to a finished run; {STREAMED}")
    cfg = compose([pair for pair in argv if not pair.startswith("to=")])
    check(cfg)
    from dqbench.text.streamed import stream

    return Path(targets[-1]), stream(cfg, Path(targets[-1]))


def measured(content: dict[str, Any]) -> list[str]:
    """Bits per weight by the bill, and what the work took in memory, for people."""
    memory = content["memory"]
    parts = f"a decoder layer {memory['layer']:,}, its calibration inputs {memory['calibration']:,}"
    return [
        f"bits per weight: {content['origin']['cost']['bits_per_weight']:.4f}",
        f"peak memory: {memory['peak']:,} bytes, {memory['peak'] - memory['start']:,} above what was in use before",
        f"of these: {parts}; the network would take {memory['network']:,}",
    ]


@command
def main(argv: list[str]) -> None:
    """Pack a finished run, or a checkpoint; print what was written, with json=PATH also write that there."""
    given, target = split_json(argv)
    of_checkpoint = any(pair.startswith("model=") for pair in given)
    folder, content = (export_checkpoint if of_checkpoint else export_run)(given)
    print("\n".join([str(folder), *lines(content), *(measured(content) if of_checkpoint else [])]))
    if target:
        atomic_write(target, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
