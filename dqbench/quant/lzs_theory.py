"""Where QuaRTZ's argument holds: what leading-zero suppression does to each layer's input, beside plain INT4.

QuaRTZ (arXiv:2509.26436) compares mean errors in steps s8 of stage 1: INT4's step is 16 s8 and its error at most 8 s8,
that of LZS at most 15 s8 where a group is shifted at all; P(|q| >= 8) < 1/2 is then enough for LZS to be closer. That
compares bounds, element by element; the measured means are here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.diagnostics import curves
from dqbench.quant.block_formats import BlockFormat, decode, encode
from dqbench.quant.dynamic import LzsForm, LzsQuantizer
from dqbench.quant.dynamic_attach import axis_of, evenly
from dqbench.quant.zero_suppression import CODE_BITS, CODE_MAX, choose_flags, restore, suppress

INT4 = BlockFormat("int", None, "fp16")
FLAGS = range(5)
CODES = 2 * CODE_MAX + 1  # -7..7


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


class Tally:
    """Counts and sums over the batches of one tensor, its channels at `axis`, that give its Theory.

    sums, float64: elements, those with |q| >= 8, |error| / s8 of LZS and of INT4.
    """

    def __init__(self, form: LzsForm, axis: int) -> None:
        self.quantizer, self.form = LzsQuantizer(form, CODE_BITS, axis), form
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.flags, self.codes, self.plain = (torch.zeros(count) for count in (len(FLAGS), CODES, CODES))

    def observe(self, x: Tensor) -> None:
        """Let a static range follow a batch; before all that add()."""
        self.quantizer.to(x.device).observe(x)

    def add(self, x: Tensor) -> None:
        """Take a batch into account."""
        rows, group_size = x.movedim(self.quantizer.axis, -1).float(), self.form.group_size
        codes, scale, _ = self.quantizer.to(x.device).codes(rows)
        flags = choose_flags(codes, group_size)
        short = suppress(codes, flags, group_size, self.form.rounding)
        plain = encode(rows, INT4, CODE_BITS)
        errors = (restore(short, flags, group_size, self.form.rounding) - codes, (decode(plain, INT4) - rows) / scale)
        large = (codes.abs() > CODE_MAX).double().sum()
        found = [large, *(error.abs().sum(dtype=torch.float64) for error in errors)]
        self.sums += torch.stack([large.new_tensor(x.numel()), *found]).cpu()
        self.flags = self.flags + counts(flags, len(FLAGS))
        self.codes, self.plain = self.codes + counts(short + CODE_MAX), self.plain + counts(plain.codes + CODE_MAX)

    def theory(self) -> Theory:
        """The figures of all that was added."""
        large, lzs, int4 = (self.sums[1:] / self.sums[0]).tolist()
        flags = (self.flags / self.flags.sum()).tolist()
        return Theory(large, lzs, int4, flags, entropy(self.codes), entropy(self.plain))


def check(x: Tensor, form: LzsForm, axis: int) -> Theory:
    """The figures of a tensor with its channels at `axis`."""
    tally = Tally(form, axis)
    if tally.quantizer.static:
        tally.observe(x)
    tally.add(x)
    return tally.theory()


def counts(values: Tensor, count: int = CODES) -> Tensor:
    """How often each of 0..count - 1 occurs, float64 [count], on the CPU."""
    return torch.bincount(values.flatten().long(), minlength=count).cpu().double()


def entropy(found: Tensor) -> float:
    """Of a distribution given by counts, in bits."""
    share = found / found.sum()
    return -torch.special.xlogy(share, share).sum().item() / math.log(2)


@torch.no_grad()
def theory_check(
    network: nn.Module, layers: Sequence[str], calib: CalibrationSet, form: LzsForm, rows: int
) -> dict[str, Any]:
    """Groups of curves over `layers`, in their order, from the inputs they get for `rows` rows spread over the set."""
    found = {name: Tally(form, axis_of(network.get_submodule(name))) for name in layers}
    chosen, device = evenly(calib, rows), next(network.parameters()).device
    for verb in ("observe", "add") if form.scale == "per_tensor" else ("add",):
        with watching(network, {name: getattr(tally, verb) for name, tally in found.items()}):
            for batch in chosen.batches(device):
                network(**batch)
    return as_curves([tally.theory() for tally in found.values() if tally.sums[0]])


@contextmanager
def watching(network: nn.Module, looks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside: each named layer's input goes to its function first."""
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda layer, args, look=look: look(args[0]))
        for name, look in looks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
