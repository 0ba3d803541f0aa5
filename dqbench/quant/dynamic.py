"""Activation quantizers that choose scales from the tensor in hand, token by token or group by group.

A token is [C] of a linear layer's input [B, L, C], and of a conv's input [B, C, H, W] the C channels of one pixel, so
that groups run along channels as in an im2col matmul with channels innermost. A row of that reads several pixels: its
integer sums end with each tap, and take the scale of the tap's pixel. Static scales, of all tokens and steps, are
chosen from what passes through while the quantizer is `observed` (dynamic_attach.observing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.errors import UserError, check_choice
from dqbench.quant.block_formats import BlockFormat, as_half, choose_tensor_scale, round_to
from dqbench.quant.quantizers import moving
from dqbench.quant.zero_suppression import CODE_BITS, QMAX, ROUNDINGS, bits_per_element, zero_suppress

RANGES = ("absmax", "minmax", "minmax_noshift")
SCALES = ("per_token", "per_tensor")
HALF_BITS = 16


@dataclass
class LzsForm:
    """Stage 1 of QuaRTZ and its groups. rounding: see zero_suppression.py; scale: per_token | per_tensor (static).

    range: absmax, s = max|x| / 127; minmax, s = (max - min) / 255 around the centre c = (max + min) / 2;
    minmax_noshift, the same s without c: it saturates one-sided tensors, and is for ablation only.
    """

    group_size: int
    rounding: str
    range: str
    scale: str

    def __post_init__(self) -> None:
        check_choice("act.rounding", self.rounding, ROUNDINGS)
        check_choice("act.range", self.range, RANGES)
        check_choice("act.scale", self.scale, SCALES)
        if self.group_size < 1:
            raise UserError(f"act.group_size={self.group_size} is out of range; allowed: 1 or more")

    @property
    def stored(self) -> int:
        """fp16 numbers per range: the scale, and with minmax the centre."""
        return 2 if self.range == "minmax" else 1

    def choose(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, centre), rounded to fp16, float32, of values in [low, high]."""
        scale = torch.maximum(-low, high) / QMAX if self.range == "absmax" else (high - low) / (2 * QMAX + 1)
        centre = (low + high) / 2 if self.range == "minmax" else torch.zeros_like(low)
        return as_half(scale).float(), centre.half().float()


class LzsQuantizer(nn.Module):
    """QuaRTZ's fake quantization: 8-bit codes q = clip(round((x - c) / s), +-127), at n_bits = 4 zero-suppressed.

    n_bits = 8 is stage 1 alone. axis: of the channels. scale: buffer [2] with s and c if static, [0] if per token.
    """

    def __init__(self, form: LzsForm, n_bits: int, axis: int) -> None:
        super().__init__()
        self.form, self.n_bits, self.axis = form, n_bits, axis
        self.static, self.observed = form.scale == "per_tensor", False
        self.register_buffer("scale", torch.zeros(2 if self.static else 0))
        self.extremes: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: channels at `axis`. While observed, a static range follows x, which passes unquantized."""
        if self.observed:
            self.observe(x)
            return x
        return along(x, self.axis, self._round)

    def observe(self, x: Tensor) -> None:
        """Widen the static range to hold x."""
        low, high = torch.aminmax(x.float())
        if self.extremes is not None:
            low, high = torch.minimum(low, self.extremes[0]), torch.maximum(high, self.extremes[1])
        self.extremes = low, high
        self.scale.copy_(torch.stack(self.form.choose(low, high)))

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 1 of rows [..., C], float32: (codes in -127..127, scale, centre)."""
        found = self.scale.unbind() if self.static else self.form.choose(*torch.aminmax(rows, dim=-1, keepdim=True))
        scale, centre = found
        return ((rows - centre) / scale).round_().clamp_(-QMAX, QMAX), scale, centre

    def _round(self, rows: Tensor) -> Tensor:
        codes, scale, centre = self.codes(rows)
        if self.n_bits == CODE_BITS:
            codes = zero_suppress(codes, self.form.group_size, self.form.rounding)
        return codes * scale + centre

    def overhead_bits(self, channels: int) -> float:
        """Stored bits per element beside n_bits: flags, and the numbers of a token's range."""
        flags = bits_per_element(channels, self.form.group_size) - CODE_BITS if self.n_bits == CODE_BITS else 0.0
        return flags + (0.0 if self.static else HALF_BITS * self.form.stored / channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(moving(fn), recurse)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "zero_suppression", "n_bits": self.n_bits, "axis": self.axis, "form": asdict(self.form)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> LzsQuantizer:
        """The module that spec() described."""
        return cls(LzsForm(**spec["form"]), spec["n_bits"], spec["axis"])

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, axis={self.axis}, {self.form}"


class BlockQuantizer(nn.Module):
    """Fake quantization in a block format; groups along the channels, which are at `axis`.

    scale: buffer []: the static float32 scale of NVFP4, or [0] where the format has none.
    """

    def __init__(self, form: BlockFormat, n_bits: int, axis: int) -> None:
        super().__init__()
        self.form, self.n_bits, self.axis = form, n_bits, axis
        self.static, self.observed = form.per_tensor, False
        self.register_buffer("scale", torch.zeros(() if self.static else 0))
        self.largest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: channels at `axis`. While observed, a static scale follows x, which passes unquantized."""
        if self.observed:
            self.observe(x)
            return x
        tensor_scale = self.scale if self.static else None
        return along(x, self.axis, lambda rows: round_to(rows, self.form, self.n_bits, tensor_scale))

    def observe(self, x: Tensor) -> None:
        """Widen the static range to hold x."""
        largest = x.float().abs().amax()
        self.largest = largest if self.largest is None else torch.maximum(largest, self.largest)
        self.scale.copy_(choose_tensor_scale(self.largest))

    def overhead_bits(self, channels: int) -> float:
        """Stored bits per element beside n_bits: the scales of groups."""
        return self.form.bits_per_element(self.n_bits, channels) - self.n_bits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(moving(fn), recurse)

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        return {"kind": "block_format", "n_bits": self.n_bits, "axis": self.axis, "form": asdict(self.form)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> BlockQuantizer:
        """The module that spec() described."""
        return cls(BlockFormat(**spec["form"]), spec["n_bits"], spec["axis"])

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, axis={self.axis}, {self.form}"


Quantizer = LzsQuantizer | BlockQuantizer
Make = Callable[[int, int], Quantizer]  # (n_bits, axis of the channels) -> a quantizer


def along(x: Tensor, axis: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` on float32 rows, the channels of x last; the result has x's dtype, shape and memory layout."""
    return torch.empty_like(x).copy_(change(x.movedim(axis, -1).float().contiguous()).movedim(-1, axis))
