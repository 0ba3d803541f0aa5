"""Layers in the order of the forward pass, each calibrated by what the already quantized ones before it hand on.

A language model is a row of decoder layers: quantize_layers() takes them one at a time from wherever they come (a
network in memory, or a checkpoint from which each is read when its turn comes) and hands each on when it is done, so
that one decoder layer and the inputs of the next are all that must lie in memory. Within a module, linear layers that
read one tensor are a stage: in a decoder layer {q, k, v}, o, {gate, up}, down. A stage shares one set of statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import OFF, Bits
from dqbench.errors import UserError
from dqbench.models import anatomy
from dqbench.quant.calls import Call, LayerInputs, first_inputs, input_of, stages_of
from dqbench.quant.hessian import InputStatistics, rows_of
from dqbench.quant.plan import Plan, matches
from dqbench.resources import trim


@dataclass
class DecoderInputs:
    """Inputs of the next decoder layer as quantized predecessors make them, and, if wanted, as the originals would."""

    student: LayerInputs
    teacher: LayerInputs | None

    def advance(self, layer: nn.Module, original: nn.Module | None) -> None:
        """Past `layer`, and past what it was before it was quantized."""
        self.student.advance(layer)
        if self.teacher is not None:
            self.teacher.advance(original)


@dataclass(frozen=True)
class Passes:
    """A module that is quantized and the calls that calibrate it; its full-precision twin with its own, if wanted."""

    module: nn.Module
    calls: Iterable[Call]
    teacher: nn.Module | None = None
    teacher_calls: Iterable[Call] | None = None

    def statistics(self, name: str) -> InputStatistics:
        """Of the input of the layer `name`, in one pass over the calls that ends there."""
        found, layer = InputStatistics(), self.module.get_submodule(name)
        if self.teacher is None:
            for call in self.calls:
                found.add(rows_of(layer, input_of(self.module, name, call)))
            return found
        for call, original in zip(self.calls, self.teacher_calls, strict=True):
            x, reference = input_of(self.module, name, call), input_of(self.teacher, name, original)
            found.add(rows_of(layer, x), rows_of(layer, reference))
        return found


def quantize_layers(
    layers: Iterable[tuple[str, nn.Module]],
    inputs: DecoderInputs,
    quantize: Callable[[str, nn.Module, DecoderInputs], None],
    sink: Callable[[str, nn.Module], None],
) -> None:
    """Quantize decoder layers (name, module) one after the other, in place; `sink` gets each when it is done.

    quantize: calibrates the layer with `inputs` and moves these past it.
    """
    for name, layer in layers:
        quantize(name, layer, inputs)
        sink(name, layer)


@torch.no_grad()
def quantize_decoder(
    network: nn.Module,
    patterns: Sequence[str],
    batches: Iterable[dict[str, Tensor]],
    quantize: Callable[[str, nn.Module, DecoderInputs], None],
    with_teacher: bool = False,
) -> None:
    """quantize_layers() on a network in memory, whose plan must not name layers outside of its decoder layers."""
    names = decoder_layers(network, patterns)
    check_inside(network.plan, names)
    student = first_inputs(network, names[0], batches)
    teacher = LayerInputs(list(student.hidden), student.others) if with_teacher else None
    layers = ((name, network.get_submodule(name)) for name in names)
    quantize_layers(layers, DecoderInputs(student, teacher), quantize, lambda name, layer: None)


@torch.no_grad()
def quantize_stages(passes: Passes, names: Sequence[str], solve: Callable[[list[str], InputStatistics], None]) -> None:
    """solve(names of a stage, statistics of its input), stage by stage in execution order, for the layers `names`."""
    if names:
        for stage in stages_of(passes.module, names, next(iter(passes.calls))):
            solve(stage, passes.statistics(stage[0]))


def quantize_decoder_layer(
    layer: nn.Module, names: Sequence[str], inputs: DecoderInputs, solve: Callable[[list[str], InputStatistics], None]
) -> None:
    """quantize_stages() on one decoder layer; then `inputs` are moved past it."""
    original = None if inputs.teacher is None else copy.deepcopy(layer)
    quantize_stages(Passes(layer, inputs.student, original, inputs.teacher), names, solve)
    inputs.advance(layer, original)


@dataclass(frozen=True)
class OnDisk:
    """A network whose parameters are on the meta device, and where those of its modules come from.

    read(module name): its state dict; embed(token ids [B, L]): rows of the input embedding [B, L, D].
    """

    network: nn.Module
    layers: Sequence[str]  # its decoder layers
    read: Callable[[str], Mapping[str, Tensor]]
    embed: Callable[[Tensor], Tensor]

    def first_inputs(self, batches: Iterable[dict[str, Tensor]]) -> LayerInputs:
        """What the first decoder layer is called with; of the embedding no more is read than the batches need."""
        embedding = self.network.get_input_embeddings()
        self.network.set_input_embeddings(Looked(self.embed))
        try:
            return first_inputs(self.network, self.layers[0], batches)
        finally:
            self.network.set_input_embeddings(embedding)

    def resident(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, decoder layer), each with its weights only while its turn lasts."""
        for name in self.layers:
            layer = self.network.get_submodule(name)
            layer.load_state_dict(self.read(name), assign=True)
            yield name, layer.requires_grad_(False)
            layer.to("meta")
            for module in layer.modules():
                vars(module).pop("weight_storage", None)
            trim()


class Looked(nn.Module):
    """Stands in for an embedding; has no parameters."""

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


@torch.no_grad()
def quantize_checkpoint(
    stored: OnDisk,
    batches: Iterable[dict[str, Tensor]],
    quantize: Callable[[str, nn.Module, DecoderInputs], None],
    sink: Callable[[str, nn.Module], None],
    with_teacher: bool = False,
) -> None:
    """quantize_layers() on a network on disk. What the sink does not keep of a layer is gone afterwards."""
    student = stored.first_inputs(batches)
    teacher = LayerInputs(list(student.hidden), student.others) if with_teacher else None
    quantize_layers(stored.resident(), DecoderInputs(student, teacher), quantize, sink)


def decoder_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match a pattern of model.units, the outermost ones, in order."""
    found: list[str] = []
    for name, _ in network.named_modules():
        if matches(name, patterns) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    if not found:
        raise UserError(
            f"model.units={list(patterns)} matches no decoder layer; give a pattern such as model.layers.?*"
        )
    return found


def check_inside(plan: Plan, layers: Sequence[str]) -> None:
    """Raise UserError for a planned layer that is in no decoder layer."""
    outside = [name for name in plan if not any(name.startswith(f"{layer}.") for layer in layers)]
    if outside:
        raise UserError(f"{', '.join(outside)}: in none of model.units, which alone are quantized; add to method.skip")


def inside(plan: Plan, layer: str) -> list[str]:
    """Planned layers of one decoder layer whose weights are quantized, by their names in it."""
    prefix = f"{layer}."
    return [
        name.removeprefix(prefix) for name, own in plan.items() if name.startswith(prefix) and own.weight not in OFF
    ]


def is_language_model(calib: CalibrationSet) -> bool:
    """Whether the rows of a calibration set are tokens."""
    return "input_ids" in calib.inputs


def check_language_model(method: str, pipe: DiffusionPipeline, calib: CalibrationSet) -> None:
    """Raise UserError where a method that works on decoder layers is given another network."""
    if not is_language_model(calib):
        raise UserError(f"method={method} needs a language model, which {anatomy(pipe).name} is not; try method=gptq")


def check_weights_only(method: str, bits: Bits, overrides: Mapping[str, Mapping[str, int]]) -> None:
    """Raise UserError for activation bits that a method of weights alone would ignore."""
    given = {"bits": {"act": bits.act, "attention": bits.attention, "softmax": bits.softmax}, **overrides}
    for where, own in given.items():
        for key, width in own.items():
            if key != "weight" and width not in OFF:
                allowed = "16 or 32, e.g. bits=w2a32"
                raise UserError(f"{where}.{key}={width}: method={method} quantizes weights alone; allowed: {allowed}")
