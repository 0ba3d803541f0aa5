"""MACs -> bit operations, model size, bits per weight, from the architecture alone: nothing is loaded or computed.

python -m dqbench.cost model=ddpm_cifar10 bits=w4a8 [json=PATH]
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dqbench.commands import command, split_json
from dqbench.config import Bits, Model, build, compose
from dqbench.identity import digest, plain
from dqbench.launching.checks import check

if TYPE_CHECKING:
    from torch import nn

    from dqbench.quant.plan import Plan

    Walked = tuple[nn.Module, list["LayerCost"]]  # a denoiser without weights, its layers

FULL_PRECISION = "dqbench.methods.fp32.FP32"
SCALE_BITS = 32
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number that is not quantized
OTHER = "norms and other parameters"
CONVENTION = (
    "BOPs = sum over conv and linear layers of MACs x weight bits x activation bits, full precision 32 x 32; "
    "attention matmuls excluded (bops_with_attention adds QK^T at attention x attention bits and softmax V at "
    "softmax x attention bits); where activation bits vary over the steps their mean counts; one denoiser forward, "
    "batch 1, no guidance doubling; size = all parameters of the "
    "denoiser, 32 bits where not quantized (biases and norms always), plus per quantization group of weights and "
    "activations a 32-bit scale and a zero point of the quantizer's own width, every tensor rounded up to whole "
    "bytes; bits per weight = that over the quantized weights alone, with biases that quantization adds; bits per "
    "activation = stored bits of the layers' inputs, 32 where not quantized, weighted by MACs; a layer that a cache "
    "replaces counts no BOPs and no bytes but the cache's; "
    "MB = 10^6 bytes"
)

LATER = (
    "Not in this bill, because it is known only after quantization: activation bits that vary over the steps, "
    "parameters per step, cached features. The row of a run has them."
)
BOUND = (
    "A bound, not a size: residuals are billed at their codes and the entropy of their places, less than any format "
    "stores where threshold.rule=quantile and stage 1 is dense (other rules: the share that survives of a flat "
    "residual; calib: threshold.value). What dynamic activations make for each sample is left out. The row of a run "
    "has what is stored."
)


@dataclass(frozen=True)
class LayerCost:
    """What one layer multiplies in one forward at batch 1, and holds."""

    name: str
    kind: str  # conv | linear | attention_qk | attention_sv | other
    macs: int
    weights: int  # elements of the weight of a conv or linear: what a plan quantizes
    others: int  # biases, norms, embeddings: 32 bits always

    @property
    def params(self) -> int:
        return self.weights + self.others


@dataclass(frozen=True)
class Cost:
    """Totals of a denoiser under a plan."""

    params: int
    macs: int  # conv and linear
    macs_attention: int
    bops: int
    bops_fp32: int
    bops_with_attention: int
    bops_fp32_with_attention: int
    size_bytes: int
    size_bytes_fp32: int
    bits_per_weight: float
    bits_per_act: float
    convention: str


def layers(denoiser: nn.Module, inputs: Mapping[str, Any]) -> list[LayerCost]:
    """The layers of `denoiser` in execution order, then those that do not run, then all other parameters as one entry.

    `inputs`: shapes of one forward without the batch dimension. The denoiser may be on the meta device or loaded.
    """
    from dqbench.architectures import count_macs
    from dqbench.quant.plan import LAYER_TYPES

    held = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LAYER_TYPES)}
    found = []
    for (name, kind), macs in count_macs(denoiser, inputs).items():
        found.append(of_layer(name, kind, macs, held.pop(name, None)))
    found += [of_layer(name, "linear" if layer.weight.ndim == 2 else "conv", 0, layer) for name, layer in held.items()]
    rest = sum(p.numel() for p in denoiser.parameters()) - sum(layer.params for layer in found)
    return [*found, LayerCost(OTHER, "other", 0, 0, rest)]


def of_layer(name: str, kind: str, macs: int, layer: nn.Module | None) -> LayerCost:
    """`layer` is None for an attention matmul, which holds nothing."""
    weights = layer.weight.numel() if layer is not None else 0
    total = sum(p.numel() for p in layer.parameters()) if layer is not None else 0
    return LayerCost(name, kind, macs, weights, total - weights)


def cost(
    layers: Sequence[LayerCost], plan: Plan, bits: Bits, attention_groups: int = 1, dtype: str = "float32"
) -> Cost:
    """The totals; `bits` gives the widths of the attention matmuls, `plan` those of the layers.

    attention_groups: scales of each quantizer at the attention matmuls; dtype: of what is not quantized.
    """
    kept = BYTES[dtype]
    matmuls = [layer for layer in layers if is_attention(layer)]
    products = [layer for layer in layers if not is_attention(layer)]
    chosen = [layer for layer in products if layer.name in plan and 0 < plan[layer.name].weight < 32] or products
    weights = sum(layer.weights for layer in chosen)
    acts = [layer for layer in products if layer.name not in plan or plan[layer.name].act]
    macs, macs_attention = sum(layer.macs for layer in products), sum(layer.macs for layer in matmuls)
    bops, bops_attention = (sum(bops_of(layer, plan, bits) for layer in part) for part in (products, matmuls))
    return Cost(
        params=sum(layer.params for layer in layers),
        macs=macs,
        macs_attention=macs_attention,
        bops=round(bops),
        bops_fp32=macs * 32 * 32,
        bops_with_attention=round(bops + bops_attention),
        bops_fp32_with_attention=(macs + macs_attention) * 32 * 32,
        size_bytes=sum(bytes_of(layer, plan, bits, attention_groups, kept) for layer in layers),
        size_bytes_fp32=sum(4 * layer.params for layer in layers),
        bits_per_weight=8 * sum(weight_bytes(layer, plan, kept) for layer in chosen) / weights,
        bits_per_act=mean_act_bits(acts, plan),
        convention=CONVENTION.replace("32 bits where not", f"{8 * kept} bits where not"),
    )


def mean_act_bits(layers: Sequence[LayerCost], plan: Plan) -> float:
    """Stored bits per element of the layers' inputs, 32 where not planned, weighted by the MACs that read them."""
    width = {name: own.act + own.act_overhead_bits for name, own in plan.items()}
    macs = sum(layer.macs for layer in layers)
    return sum(layer.macs * width.get(layer.name, 32) for layer in layers) / macs if macs else 32.0


def is_attention(layer: LayerCost) -> bool:
    """Whether `layer` is a matmul of two activations."""
    return layer.kind in ("attention_qk", "attention_sv")


def widths_of(layer: LayerCost, plan: Plan, bits: Bits) -> tuple[float, float]:
    """Bit-widths of the two factors of a layer's products."""
    if layer.kind == "attention_qk":
        return bits.attention, bits.attention
    if layer.kind == "attention_sv":
        return bits.softmax, bits.attention
    return (plan[layer.name].weight, plan[layer.name].act) if layer.name in plan else (32, 32)


def bops_of(layer: LayerCost, plan: Plan, bits: Bits) -> float:
    """MACs x bits x bits."""
    left, right = widths_of(layer, plan, bits)
    return layer.macs * left * right


def bytes_of(layer: LayerCost, plan: Plan, bits: Bits, attention_groups: int = 1, kept: int = 4) -> int:
    """Bytes of a layer: weight, biases, parameters of its quantizers; `kept` for each number that is not quantized."""
    if is_attention(layer):
        return sum(qparam_bytes(attention_groups, width) for width in widths_of(layer, plan, bits))
    own = plan.get(layer.name)
    act = qparam_bytes(own.act_groups, own.act) + whole_bytes(own.act_table_bits) if own else 0
    others = 0 if own and own.weight == 0 else kept * layer.others
    return weight_bytes(layer, plan, kept) + others + act


def weight_bytes(layer: LayerCost, plan: Plan, kept: int = 4) -> int:
    """Bytes of a layer's weight with its scales, zero points, codebooks, indices, and a bias that was added to it."""
    if layer.name not in plan:
        return kept * layer.weights
    own = plan[layer.name]
    codes = whole_bytes(layer.weights * own.weight) + whole_bytes(own.weight_overhead_bits)
    return codes + qparam_bytes(own.weight_groups, own.weight) + kept * own.added_bias


def qparam_bytes(groups: int, n_bits: float) -> int:
    """Bytes of `groups` scales and zero points; none where the quantizer is off."""
    return whole_bytes(groups * SCALE_BITS) + whole_bytes(groups * ceil(n_bits)) if n_bits < 32 else 0


def whole_bytes(n_bits: int) -> int:
    """Bits rounded up to bytes."""
    return ceil(n_bits / 8)


def plan_of(denoiser: nn.Module, cfg: DictConfig) -> tuple[Plan, Bits]:
    """What the configured method quantizes, as far as the bill goes.

    Read of cfg.method, where present: skip, overrides, weight.granularity, weight.group_size, split, attention.
    """
    from dqbench.quant.plan import select, split, stored_width

    bits: Bits = OmegaConf.to_object(cfg.bits)
    bits = replace(bits, attention=stored_width(bits.attention), softmax=stored_width(bits.softmax))
    node = cfg.method.get("base") or cfg.method  # what a method that builds on another one quantizes is the other's
    method = OmegaConf.to_container(node, resolve=True)
    if hasattr(pkgutil.resolve_name(method["_target_"]), "plan"):
        return build(node).plan(denoiser, bits), bits
    if method["_target_"] == FULL_PRECISION:
        return {}, Bits(32, 32, 32, 32)
    weight = method.get("weight", {})
    grouping = {key: weight[key] for key in ("granularity", "group_size") if key in weight}
    plan = select(denoiser, bits, method.get("skip", []), method.get("overrides", {}), **grouping)
    if method.get("split"):
        plan = split(plan, cfg.model.shortcuts)
    if not method.get("attention", True):
        bits = replace(bits, attention=32, softmax=32)
    if method.get("act_site", "input") == "output" or "act" not in method:  # nothing rounds what the matmuls read
        plan = {name: replace(own, act=32) for name, own in plan.items()}
    return plan, bits


def bare(model: Model) -> Walked:
    """A model's denoiser without weights, and its layers."""
    from dqbench.architectures import build as on_meta
    from dqbench.models import architecture, input_shapes

    config = architecture(model)
    denoiser = on_meta(config)
    return denoiser, layers(denoiser, input_shapes(model, config))


def report(cfg: DictConfig, known: dict[str, Walked] | None = None) -> dict[str, Any]:
    """The bill of a composed config: {model, bits, total, layers}. known: bare() of models, by their key."""
    model, known = OmegaConf.to_object(cfg.model), {} if known is None else known
    if (key := digest(plain(cfg.model))) not in known:
        known[key] = bare(model)
    denoiser, found = known[key]
    plan, bits = plan_of(denoiser, cfg)
    return {
        "model": model.name,
        "bits": asdict(bits),
        "total": asdict(cost(found, plan, bits, dtype=model.dtype)),
        "notes": notes(cfg),
        "layers": [entry(layer, plan, bits, BYTES[model.dtype]) for layer in found],
    }


def notes(cfg: DictConfig) -> list[str]:
    """What the bill of a composed config leaves out, or only bounds, because it is known after quantization only."""
    base = cfg.method.get("base") or cfg.method
    later = [LATER] if {"mixed", "fsc"} & set(cfg.method) else []
    return later + ([BOUND] if "threshold" in base.get("weight", {}) else [])


def entry(layer: LayerCost, plan: Plan, bits: Bits, kept: int) -> dict[str, Any]:
    """One line of the per-layer table."""
    left, right = widths_of(layer, plan, bits)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "params": layer.params,
        "macs": layer.macs,
        "bits": [left, right],
        "bops": bops_of(layer, plan, bits),
        "size_bytes": bytes_of(layer, plan, bits, kept=kept),
    }


@command
def main(argv: list[str]) -> None:
    """Print the bill of the configured model and method; with json=PATH also write it there."""
    from rich.console import Console

    from dqbench.bill import layer_table, total_table
    from dqbench.results import atomic_write

    overrides, path = split_json(argv)
    cfg = compose(overrides)
    check(cfg)
    bill = report(cfg)
    console, total = Console(), bill["total"]
    console.print(layer_table(bill["layers"]))
    console.print(total_table(f"{bill['model']}, {cfg.method.get('_target_', '')}", total))
    quantized = sum(layer["params"] for layer in bill["layers"] if layer["bits"][0] < 32)
    console.print(f"{total['params'] / 1e6:,.3f} M parameters, {quantized / 1e6:,.3f} M of them in quantized layers")
    console.print(f"{total['macs'] / 1e9:,.3f} GMAC conv and linear")
    console.print(total["convention"])
    for note in bill["notes"]:
        console.print(note)
    if path:
        atomic_write(path, json.dumps(bill, indent=1) + "\n")


if __name__ == "__main__":
    main()
