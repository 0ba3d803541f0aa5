"""Which layers are quantized, to how many bits, with how many scales: what a bill of BOPs and bytes needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dqbench.config import OFF
from dqbench.errors import UserError

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Linear)
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@dataclass(frozen=True)
class LayerBits:
    """Bit-widths of one layer: 2..8, or 32 for off. A group is one scale with its zero point.

    weight 0: nothing reads the layer's parameters, bias included; what stands in for them is in the overhead.
    """

    weight: int
    act: float  # of the layer's input; where it varies over the sampling steps, the mean over the steps
    weight_groups: int
    act_groups: int
    weight_overhead_bits: int = 0  # whatever else is stored with the weight: codebook, indices, outliers, cache
    act_overhead_bits: float = 0.0  # per element of the input, beside `act`: flags, scales, residuals made at run time
    act_table_bits: int = 0  # stored once, beside scales and zero points of the input: centroids
    added_bias: int = 0  # numbers of a bias that quantization gave the layer: where it has none, or per bin of time

    def described(self) -> dict[str, Any]:
        """As JSON; what most plans have no use for is left out where it is 0."""
        rare = {field.name for field in fields(self)} & {"act_table_bits", "added_bias"}
        return {key: value for key, value in asdict(self).items() if value or key not in rare}


Plan = dict[str, LayerBits]  # module name -> bits; a layer that is absent stays in full precision


def select(
    denoiser: nn.Module,
    bits: Any,
    skip: Sequence[str],
    overrides: Mapping[str, Mapping[str, int]],
    granularity: str = "per_channel",
    group_size: int | None = None,
) -> Plan:
    """The plan for every conv and linear of `denoiser` at bits.weight and bits.act, activations per tensor.

    Names that match a pattern of `skip` stay in full precision; those that match a key of `overrides` take its
    {weight, act} instead, the last match winning. Works on the meta device.
    """
    check_granularity(granularity, group_size)
    plan = {}
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, LAYER_TYPES) or matches(name, skip):
            continue
        widths = widths_of(name, bits, overrides)
        if set(widths.values()) != {32}:
            plan[name] = LayerBits(**widths, weight_groups=count_groups(layer, granularity, group_size), act_groups=1)
    return plan


def split(plan: Plan, patterns: Sequence[str]) -> Plan:
    """`plan` with the matching layers quantized in two halves along their input channels (Q-Diffusion, section 3.3)."""
    return {
        name: replace(layer, weight_groups=2 * layer.weight_groups, act_groups=2 * layer.act_groups)
        if matches(name, patterns)
        else layer
        for name, layer in plan.items()
    }


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches one of the fnmatch patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def widths_of(name: str, bits: Any, overrides: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{weight, act} of the layer `name`."""
    widths = {"weight": bits.weight, "act": bits.act}
    for pattern, own in overrides.items():
        check_widths(pattern, own)
        if fnmatchcase(name, pattern):
            widths |= own
    return {key: stored_width(width) for key, width in widths.items()}


def stored_width(width: int) -> int:
    """The width that is really used and billed: 16 switches a quantizer off as 32 does, nothing is cast to 16 bits."""
    return 32 if width in OFF else width


def check_widths(pattern: str, own: Mapping[str, int]) -> None:
    """Raise UserError for an override with an unknown key or width."""
    for key, width in own.items():
        if key not in ("weight", "act") or not (2 <= width <= 8 or width in OFF):
            raise UserError(f"override {pattern}: {key}={width}; allowed: weight and act, of 2 to 8, 16 or 32 bits")


def check_granularity(granularity: str, group_size: int | None) -> None:
    """Raise UserError for an unknown granularity, or a group size that does not go with it."""
    if granularity not in GRANULARITIES:
        raise UserError(f"granularity={granularity} is unknown; allowed: {', '.join(GRANULARITIES)}")
    if granularity == "per_group" and not (group_size and group_size > 0):
        raise UserError(f"granularity=per_group needs a group_size of 1 or more, got {group_size}")


def count_groups(layer: nn.Module, granularity: str, group_size: int | None) -> int:
    """Scales of a layer's weight; a group is `group_size` consecutive elements of one output channel."""
    channels = layer.weight.shape[0]
    if granularity == "per_tensor":
        return 1
    if granularity == "per_channel":
        return channels
    return channels * -(-layer.weight[0].numel() // group_size)
