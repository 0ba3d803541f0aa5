"""A released language model's folder -> a packed one, a decoder layer at a time: neither is ever whole in memory.

What a cell does in memory, with the same result: masked rows calibrate, each layer sees the quantized ones before it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dqbench import cost
from dqbench.calibration import CalibrationSet
from dqbench.config import build
from dqbench.errors import UserError
from dqbench.export import appearing, check_free, describe, put_weights, save_components, sizes, write_manifest
from dqbench.identity import digest, plain
from dqbench.launching.preflight import choose_device
from dqbench.load import PACKED, kind_of
from dqbench.modality import check_calibration, check_kind
from dqbench.models import attach_anatomy, checkpoint_hash, denoiser, input_shapes, is_released, snapshot
from dqbench.provenance import stamp, version
from dqbench.quant.compact import pack_state, twins
from dqbench.quant.container import Writer
from dqbench.quant.sequential import OnDisk, check_inside, check_weights_only, decoder_layers, quantize_checkpoint
from dqbench.resources import full_float32, peak_memory, restart_peak, return_large, set_threads
from dqbench.sampling import set_sampler
from dqbench.stages import taking_turns
from dqbench.text.checkpoints import assemble
from dqbench.text.data import check_rows
from dqbench.text.modality import masked_rows
from dqbench.text.released import open_layers

METHODS = ("quant_dllm", "quant_dllm_official", "gptq", "awq")  # presets of methods with quantize_layer()


def stream(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Quantize the configured checkpoint into the packed `folder`, which appears when it is whole; what it holds."""
    return_large()
    restart_peak()
    job = Job(cfg, peak_memory())
    check_free(folder)
    with (
        taking_turns(Path(cfg.paths.cache), f"packed-{digest(str(folder.resolve()))}"),
        appearing(folder) as part,
    ):
        save_components(job.pipe, job.model.denoiser, part)
        file = part / job.model.denoiser / PACKED
        with Writer(file) as writer:
            headers = job.write(writer)
        found = sizes(job.network, headers, writer.described, file)
        origin = job.origin()
        found |= {"billed_bytes": origin["cost"]["size_bytes"]}
        names = {"sampler": asdict(job.sampler), "denoiser": job.model.denoiser}
        write_manifest(part, {"origin": origin, **names, "sizes": found})
    kinds = Counter(map(kind_of, headers.values()))
    return {"origin": origin, "layers": dict(kinds), "sizes": found, "memory": job.memory()}


@dataclass
class Job:
    """A checkpoint, a method, and what calibrates it; all checked, and nothing but headers and the tokenizer read."""

    cfg: DictConfig
    start: int  # bytes of memory in use before

    def __post_init__(self) -> None:
        """Raise UserError for what could not be done."""
        cfg = self.cfg
        self.model, self.sampler, self.calib, bits = (
            OmegaConf.to_object(cfg[key]) for key in ("model", "sampler", "calib", "bits")
        )
        self.method, self.device = build(cfg.method), choose_device(cfg.runtime.device)
        self.dtype = getattr(torch, self.model.dtype)
        check_kind(self.model, self.method, self.sampler)
        check_calibration(self.model, self.calib)
        check_method(self.method)
        check_weights_only(f"{self.method.name}, layer by layer,", bits, self.method.overrides)
        check_rows(self.model.data, "calib.mask", self.calib.mask.rows, self.calib.mask.length)
        self.checkpoint = open_layers(released(self.model))
        self.pipe = assemble(self.checkpoint, lambda: self.checkpoint.empty(self.dtype))
        attach_anatomy(self.pipe, self.model)
        set_sampler(self.pipe, self.sampler)
        self.layers = decoder_layers(self.network, self.model.units)
        self.network.plan, self.bits = cost.plan_of(self.network, cfg)
        check_inside(self.network.plan, self.layers)
        if not any(0 < own.weight < 32 for own in self.network.plan.values()):
            raise UserError("there is nothing to pack: no weight would be quantized; allowed: e.g. bits=w2a32")
        self.rows = self.masked()

    @property
    def network(self) -> nn.Module:
        """Its parameters are on the meta device."""
        return denoiser(self.pipe)

    def masked(self) -> CalibrationSet:
        """Masked rows of the model's data, as a cell's."""
        found = masked_rows(self.model, self.calib, self.pipe, self.cfg.seed)
        step = found.pop("step")
        return CalibrationSet(found, step, self.cfg.seed, self.calib.batch_size, self.dtype)

    def write(self, writer: Writer) -> dict[str, Any]:
        """Quantize and write layer by layer, then what is not quantized; headers of the weights, by layer."""
        full_float32()
        set_threads(self.cfg.runtime.threads, self.network)
        buffers_to(self.network, self.device)
        sink = Sink(writer, len(self.layers))
        quantize = partial(self.method.quantize_layer, plan=self.network.plan)
        disk = OnDisk(self.network, self.layers, self.read, self.embed)
        quantize_checkpoint(disk, self.rows.batches(self.device), quantize, sink, self.method.compares)
        for name in self.outside():
            for piece in self.checkpoint.pieces(name):
                writer.extend(name, piece.to(self.dtype))
        quantization = describe(self.network, asdict(self.model))
        shared = {"shared": found} if (found := twins(self.network)) else {}
        writer.complete({"layers": sink.headers, "state": sink.state | shared, "quantization": quantization})
        return sink.headers

    def read(self, module: str) -> dict[str, Tensor]:
        """The state dict of a module, copied: a file's own bytes may lie where kernels round otherwise."""
        return {
            name.removeprefix(f"{module}."): tensor.to(self.device, self.dtype, copy=True)
            for name, tensor in self.checkpoint.stream(f"{module}.")
        }

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the input embedding."""
        embedding = self.network.get_input_embeddings()
        (name,) = (name for name, module in self.network.named_modules() if module is embedding)
        return self.checkpoint.rows(f"{name}.weight", ids.cpu()).to(self.device, self.dtype)

    def outside(self) -> list[str]:
        """Names of the tensors that belong to no decoder layer."""
        return [name for name in self.checkpoint.tensors if not name.startswith(tuple(f"{x}." for x in self.layers))]

    def origin(self) -> dict[str, Any]:
        """Where the packed folder comes from, with its bill."""
        return {
            "model": self.model.name,
            "method": self.method.name,
            "bits": plain(self.cfg.bits),
            "seed": self.cfg.seed,
            "calib": plain(self.cfg.calib),
            "settings": plain(self.cfg.method),
            "cost": self.bill(),
            "checkpoint": checkpoint_hash(self.model),
            "dqbench": version("dqbench"),
            "git_commit": stamp(self.device)["git_commit"],
        }

    def bill(self) -> dict[str, Any]:
        """As in a row: with what the layers really store."""
        found = cost.layers(self.network, input_shapes(self.model, self.network.config.to_dict()))
        return asdict(cost.cost(found, self.network.plan, self.bits, dtype=self.model.dtype))

    def memory(self) -> dict[str, int]:
        """Bytes: the peak; what was in use before; a decoder layer, the inputs of one, and the whole network."""
        layers = [self.network.get_submodule(name) for name in self.layers]
        tokens = self.rows.inputs["input_ids"].size * (1 + self.method.compares)
        return {
            "peak": peak_memory(),
            "start": self.start,
            "layer": max(map(nbytes, layers)),
            "calibration": tokens * self.network.config.hidden_size * self.dtype.itemsize,
            "network": nbytes(self.network),
        }


@dataclass
class Sink:
    """Takes each layer when it is quantized: writes it, keeps its headers, tells."""

    writer: Writer
    total: int
    headers: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    since: float = field(default_factory=time.monotonic)

    def __call__(self, name: str, layer: nn.Module) -> None:
        first = self.writer.nbytes
        found = put_weights(self.writer, layer, f"{name}.")
        rest, self.state = pack_state(layer)
        for key, value in rest.items():
            self.writer.add(f"{name}.{key}", value)
        self.headers |= found
        self.done, now = self.done + 1, time.monotonic()
        what = f"{len(found)} weights, {self.writer.nbytes - first:,} of {nbytes(layer):,} bytes"
        print(f"{name}, {self.done} of {self.total}: {what}, {now - self.since:.1f} s", file=sys.stderr, flush=True)
        self.since = now


def check_method(method: Any) -> None:
    """Raise UserError for a method that works on the network as a whole."""
    if not hasattr(method, "quantize_layer"):
        line = f"method={method.name} needs the whole network; layer by layer: {', '.join(METHODS)}"
        raise UserError(f"{line}; for others run python -m dqbench, then export run_id=ID")


def released(model: Any) -> Path:
    """The folder of a released language model. Raises UserError for another kind."""
    folder = Path(snapshot(model))
    if not is_released(folder, model):
        line = f"model.path={model.path} is no released language model; layer by layer those alone are quantized"
        raise UserError(f"{line}; for others run python -m dqbench, then export run_id=ID")
    return folder


def buffers_to(network: nn.Module, device: str) -> None:
    """Move the buffers of a network whose parameters are on the meta device."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def nbytes(module: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
