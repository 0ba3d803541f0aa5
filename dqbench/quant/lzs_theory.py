"""Where QuaRTZ's argument holds: what leading-zero suppression does to each layer's input, beside plain INT4.

QuaRTZ (arXiv:2509.26436) compares mean errors in steps s8 of stage 1: INT4's step is 16 s8 and its error at most 8 s8,
that of LZS at most 15 s8 where a group is shifted at all; P(|q| >= 8) < 1/2 is then enough for LZS to be closer. That
compares bounds, element by element; the measured means are here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.diagnostics import curves
from dqbench.quant.block_formats import BlockFormat, decode, encode
from dqbench.quant.dynamic import LzsForm, LzsQuantizer
from dqbench.quant.dynamic_attach import axis_of
from dqbench.quant.zero_suppression import CODE_BITS, CODE_MAX, choose_flags, restore, suppress

INT4 = BlockFormat("int", None, "fp16")
FLAGS = range(5)


@dataclass(frozen=True)
class Theory:
    """Of one tensor: P(|q| >= 8), mean |error| / s8 of LZS beside stage 1's codes and of INT4 per token, shares of the
    flags 0..4, entropy of the 4-bit codes in bits.
    """

    large: float
    lzs: float
    int4: float
    flags: list[float]
    entropy: float
    entropy_int4: float


def check(x: Tensor, form: LzsForm, axis: int) -> Theory:
    """The figures of a tensor with its channels at `axis`."""
    quantizer = LzsQuantizer(form, CODE_BITS, axis).to(x.device)
    if quantizer.static:
        quantizer.observe(x)
    rows = x.movedim(axis, -1).float()
    codes, scale, _ = quantizer.codes(rows)
    flags = choose_flags(codes, form.group_size)
    short = suppress(codes, flags, form.group_size, form.rounding)
    plain = encode(rows, INT4, CODE_BITS)
    return Theory(
        large=(codes.abs() > CODE_MAX).float().mean().item(),
        lzs=(restore(short, flags, form.group_size, form.rounding) - codes).abs().mean().item(),
        int4=((decode(plain, INT4) - rows) / scale).abs().mean().item(),
        flags=shares(flags, len(FLAGS)).tolist(),
        entropy=entropy(short),
        entropy_int4=entropy(plain.codes),
    )


def shares(values: Tensor, count: int) -> Tensor:
    """How often each of 0..count - 1 occurs, float64 [count], sum 1."""
    return torch.bincount(values.flatten().long(), minlength=count).double() / values.numel()


def entropy(codes: Tensor) -> float:
    """Of the distribution of codes in -7..7, in bits."""
    found = shares(codes.long() + CODE_MAX, 2 * CODE_MAX + 1)
    return -torch.special.xlogy(found, found).sum().item() / math.log(2)


@torch.no_grad()
def theory_check(
    network: nn.Module, layers: Sequence[str], calib: CalibrationSet, form: LzsForm, rows: int
) -> dict[str, Any]:
    """Groups of curves over `layers`, in their order, from the inputs they get for `rows` rows spread over the set."""
    chosen = np.unique(np.linspace(0, len(calib) - 1, min(rows, len(calib))).astype(int))
    found: dict[str, Theory] = {}
    handles = [network.get_submodule(name).register_forward_pre_hook(_checker(name, form, found)) for name in layers]
    try:
        network(**calib.rows(chosen, next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return as_curves([found[name] for name in layers if name in found])


def _checker(name: str, form: LzsForm, found: dict[str, Theory]) -> Any:
    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = check(args[0], form, axis_of(layer))

    return look


def as_curves(found: Sequence[Theory]) -> dict[str, Any]:
    """A group for each question of the theory."""
    groups = {
        "LZS: P(|q| >= 8), below 1/2 suffices": {"P(|q| >= 8)": [each.large for each in found]},
        "LZS: mean |error| / s8": {"LZS": [each.lzs for each in found], "INT4": [each.int4 for each in found]},
        "LZS: share of flags": {f"F = {k}": [each.flags[k] for each in found] for k in FLAGS},
        "LZS: entropy of 4-bit codes": {
            "LZS": [each.entropy for each in found],
            "INT4": [each.entropy_int4 for each in found],
        },
    }
    return {name: curves(range(len(found)), lines, x_label="layer") for name, lines in groups.items()} if found else {}
