"""Module tree -> module tree: select -> prepare -> (reconstruct) -> quantize_inputs -> calibrating -> freeze.

The only file that knows hooks and parametrizations. Weights are baked into plain layers; activations get one child
`act_quantizer` and one pre-hook (or post-hook), attention matmuls a processor. Layer types and the original keys of the
state dict stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dqbench.config import OFF, Bits
from dqbench.progress import track
from dqbench.quant import uniform
from dqbench.quant.adaround import AdaRound
from dqbench.quant.attention import PARTS, QuantAttnProcessor, attention_layers, check_quantizable
from dqbench.quant.functional import fake_quantize
from dqbench.quant.plan import LayerBits, Plan
from dqbench.quant.quantizers import (
    ActQuantizer,
    ActRule,
    Grid,
    Observer,
    SplitQuantizer,
    WeightRule,
    act_quantizers,
    weight_grid,
)


@dataclass
class QuantLayer:
    """A quantized conv or linear: its full-precision weight, its grid (None: weight kept), its bits and split."""

    layer: nn.Module
    weight: Tensor
    grid: Grid | None
    act_bits: int
    split: int


def prepare(student: nn.Module, plan: Plan, rule: WeightRule, splits: dict[str, int]) -> dict[str, QuantLayer]:
    """Round the weights of the planned layers to nearest, in place; each keeps its original in its QuantLayer."""
    student.plan = plan  # what the bill of a quantized pipeline is made from
    layers = {}
    for name, bits in track(plan.items(), "choose weight grids", len(plan)):
        layer, split = student.get_submodule(name), splits.get(name, 0)
        weight = layer.weight.detach().clone()
        grid = None if bits.weight in OFF else weight_grid(weight, bits.weight, rule, split)
        layers[name] = QuantLayer(layer, weight, grid, int(bits.act), split)
        if grid is not None:
            layer.weight.data = fake_quantize(weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
            layer.pack_weight = functools.partial(uniform.store, grid=grid, rule=rule, split=split)  # for freeze()
    return layers


@contextmanager
def rounding(layers: Iterable[QuantLayer], first_half_only: bool) -> Iterator[list[AdaRound]]:
    """Inside: the layers' weights are AdaRound parametrizations. After: plain layers again, hard-rounded."""
    layers = [item for item in layers if item.grid is not None]
    rounders = [
        AdaRound(item.weight, item.grid, item.split if first_half_only and item.split else None) for item in layers
    ]
    for item, rounder in zip(layers, rounders, strict=True):
        parametrize.register_parametrization(item.layer, "weight", rounder)
    try:
        yield rounders
    finally:
        for item, rounder in zip(layers, rounders, strict=True):
            parametrize.remove_parametrizations(item.layer, "weight", leave_parametrized=False)
            item.layer.weight.data = rounder.hard()


def quantize_inputs(layers: dict[str, QuantLayer], signed: bool, site: str = "input") -> None:
    """Attach an activation quantizer to every planned layer, on its input, or on its output (site: output, PTQ4DM)."""
    for item in layers.values():
        if item.act_bits not in OFF:
            cls = (
                (lambda *args, split=item.split: SplitQuantizer(split, *args))
                if item.split and site == "input"
                else ActQuantizer
            )
            attach_act_quantizer(item.layer, cls(item.act_bits, signed), site)


def attach_act_quantizer(layer: nn.Module, quantizer: nn.Module, site: str) -> None:
    """Make `quantizer` the layer's child and let a hook apply it to the layer's first input, or to its output."""
    layer.act_quantizer = quantizer.to(layer.weight.device)
    layer.act_site = site
    if site == "input":
        layer.register_forward_pre_hook(_quantize_input)
    else:
        layer.register_forward_hook(_quantize_output)


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.act_quantizer(args[0]), *args[1:])


def _quantize_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return layer.act_quantizer(output)


def quantize_attention(student: nn.Module, bits: Bits, signed: bool, signed_softmax: bool) -> None:
    """Give attention modules quantizers for q, k, v at bits.attention and for softmax outputs at bits.softmax.

    Raises UserError for an attention module that works in a way of its own.
    """
    if not {bits.attention, bits.softmax} <= set(OFF):
        check_quantizable(student)
    for attn in attention_layers(student).values():
        quantizers = {}
        for part in PARTS:
            n_bits = bits.softmax if part == "softmax" else bits.attention
            if n_bits not in OFF:
                quantizers[part] = ActQuantizer(n_bits, signed_softmax if part == "softmax" else signed)
        if quantizers:
            attn.set_processor(QuantAttnProcessor(quantizers).to(next(attn.parameters()).device))


@contextmanager
def calibrating(
    student: nn.Module,
    rule: ActRule,
    softmax_rule: ActRule | None = None,
    only: type[ActQuantizer] = ActQuantizer,
    observer: type[Observer] = Observer,
) -> Iterator[None]:
    """Inside: activation quantizers choose their ranges from what passes through. Softmax outputs keep zero_point 0.

    only: the kind of quantizer that is calibrated; observer: what follows the tensors.
    """
    softmax = {
        attn.processor.quantizers["softmax"]
        for attn in _quantized_attention(student)
        if "softmax" in attn.processor.quantizers
    }
    quantizers = [quantizer for quantizer in act_quantizers(student) if isinstance(quantizer, only)]
    for quantizer in quantizers:
        is_softmax = quantizer in softmax and not quantizer.signed
        own = softmax_rule if quantizer in softmax and softmax_rule is not None else rule
        quantizer.observer = observer(own, quantizer.n_bits, always_zero=is_softmax)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _quantized_attention(student: nn.Module) -> list[nn.Module]:
    return [attn for attn in attention_layers(student).values() if isinstance(attn.processor, QuantAttnProcessor)]


def installed(student: nn.Module, bits: Bits) -> tuple[Plan, Bits]:
    """What is really quantized in `student`: its layers, and `bits` without attention widths that nothing uses."""
    parts = {part for attn in _quantized_attention(student) for part in attn.processor.quantizers}
    attention, softmax = (
        width if used else 32 for width, used in ((bits.attention, "q" in parts), (bits.softmax, "softmax" in parts))
    )
    plan = {name: as_attached(student.get_submodule(name), own) for name, own in getattr(student, "plan", {}).items()}
    return plan, replace(bits, attention=attention, softmax=softmax)


def as_attached(layer: nn.Module, bits: LayerBits) -> LayerBits:
    """`bits` with the width and number of the quantizers that are attached to the layer's input.

    Where the width varies over the steps, `bits` holds its mean over the sampler's calls already.

    32-bit activations where there is none (an output quantizer does not count); unchanged for weights nobody reads.
    """
    if bits.weight == 0:
        return bits
    if not hasattr(layer, "act_quantizer") or layer.act_site != "input":
        return replace(bits, act=32)
    quantizers = act_quantizers(layer.act_quantizer) or [layer.act_quantizer]
    widths = [width for quantizer in quantizers for width in getattr(quantizer, "widths", [quantizer.n_bits])]
    same = len(set(widths)) == 1
    groups = sum(quantizer.scale.numel() for quantizer in quantizers)
    return replace(bits, act=widths[0] if same else bits.act, act_groups=groups)


def freeze(student: nn.Module) -> nn.Module:
    """No gradients, eval mode, weights on a grid stored as codes: nothing changes from here on."""
    for name, layer in student.named_modules():
        pack = vars(layer).pop("pack_weight", None)
        if pack is not None and student.plan[name].weight and (storage := pack(layer.weight)) is not None:
            layer.weight_storage = storage
            layer.weight.data += 0.0  # codes know no -0
    return student.requires_grad_(False).eval()


def find_units(student: nn.Module, patterns: Sequence[str], layers: dict[str, QuantLayer]) -> dict[str, list[str]]:
    """Reconstruction units -> the quantized layers in them, in registration order.

    A module that matches a pattern is a unit, the outermost match wins; a layer outside of any is a unit of its own.
    Units without a quantized weight are left out.
    """
    units: dict[str, list[str]] = {}
    for name, _ in student.named_modules():
        parents = name.split(".")
        owner = next((unit for k in range(len(parents)) if (unit := ".".join(parents[:k])) in units), None)
        if owner is not None:
            if name in layers:
                units[owner].append(name)
        elif name and any(fnmatchcase(name, pattern) for pattern in patterns):
            units[name] = []
        elif name in layers:
            units[name] = [name]
    for name in [name for name in units if name in layers and name not in units[name]]:
        units[name].append(name)
    return {name: members for name, members in units.items() if members}
