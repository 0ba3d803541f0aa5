"""Block formats: low-bit elements in groups that share a stored scale. INT b, MXFP4 and NVFP4, as values and as bits.

| format   | element | group            | scale of a group                                           | bits / element |
|----------|---------|------------------|------------------------------------------------------------|----------------|
| int      | int b   | none: a whole row| fp16, largest magnitude / (2^(b-1) - 1)                    | b + 16 / C     |
| int, G   | int b   | G                | the same                                                   | b + 16 / G     |
| mxfp4    | E2M1    | 32               | E8M0, 2^(floor(log2 largest) - 2) (OCP MX 1.0, section 6.3)| 4.25           |
| nvfp4    | E2M1    | 16               | E4M3, largest / 6 in units of a float32 scale per tensor   | 4.5            |

Rows are the last dimension, where groups are consecutive elements; the last group of a row may be short. Scales are
used as they are stored, rounded to their own format. E2M1's magnitudes: 0, .5, 1, 1.5, 2, 3, 4, 6; rounding is to
nearest, ties to the even code, larger values saturate.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from dqbench.errors import UserError, check_choice

ELEMENTS = ("int", "e2m1")
SCALE_BITS = {"fp16": 16, "e8m0": 8, "e4m3": 8}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # code -> magnitude; bit 3 of a code is the sign
E2M1_EXPONENT = 2  # of its largest magnitude
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9
E8M0_BIAS = 127
HALF_MIN, HALF_MAX = 2.0**-24, 65504.0  # smallest and largest positive fp16
TENSOR_SCALE_BITS = 32


@dataclass
class BlockFormat:
    """element: int | e2m1 (4 bits); group_size: null for whole rows; scale: fp16 | e8m0 | e4m3."""

    element: str
    group_size: int | None
    scale: str

    def __post_init__(self) -> None:
        check_choice("format.element", self.element, ELEMENTS)
        check_choice("format.scale", self.scale, SCALE_BITS)
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"format.group_size={self.group_size} is out of range; allowed: null, or 1 or more")
        if (self.element == "int") != (self.scale == "fp16"):
            allowed = "int with fp16, e2m1 with e8m0 or e4m3"
            raise UserError(f"format.element={self.element} with scale={self.scale} is no known format; {allowed}")

    @property
    def per_tensor(self) -> bool:
        """Whether scales are in units of one float32 scale of the whole tensor."""
        return self.scale == "e4m3"

    def groups(self, channels: int) -> int:
        """Scales of a row."""
        return ceil(channels / (self.group_size or channels))

    def bits_per_element(self, n_bits: int, channels: int) -> float:
        """Stored bits in a row, its scales included; of a scale per tensor nothing."""
        return n_bits + SCALE_BITS[self.scale] * self.groups(channels) / channels


@dataclass(frozen=True)
class Blocks:
    """codes: int8 [..., C], signed integers or E2M1 codes 0..15; scale: [..., groups] as stored, fp16, uint8 (E8M0, the
    biased exponent) or float8_e4m3fn; tensor_scale: float32 [], 1 where the format has none.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor


def encode(x: Tensor, form: BlockFormat, n_bits: int, tensor_scale: Tensor | None = None) -> Blocks:
    """The elements and scales of x [..., C]; tensor_scale [] is taken from x where it is not given."""
    groups, scale, tensor_scale = scaled(x, form, n_bits, tensor_scale)
    elements = nearest(groups / scale_values(scale, tensor_scale).unsqueeze(-1), form, n_bits)
    codes = e2m1_codes(elements) if form.element == "e2m1" else elements.to(torch.int8)
    return Blocks(codes.flatten(-2)[..., : x.shape[-1]], scale, tensor_scale)


def decode(blocks: Blocks, form: BlockFormat) -> Tensor:
    """The values, float32 [..., C]."""
    codes = blocked(blocks.codes, form)
    elements = e2m1_values(codes) if form.element == "e2m1" else codes.float()
    values = elements * scale_values(blocks.scale, blocks.tensor_scale).unsqueeze(-1)
    return values.flatten(-2)[..., : blocks.codes.shape[-1]]


def round_to(x: Tensor, form: BlockFormat, n_bits: int, tensor_scale: Tensor | None = None) -> Tensor:
    """decode(encode(x)) in x's precision, without the detour over codes: fake quantization."""
    groups, scale, tensor_scale = scaled(x, form, n_bits, tensor_scale)
    values = scale_values(scale, tensor_scale).unsqueeze(-1)
    rounded = nearest(groups / values, form, n_bits).mul_(values)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def scaled(x: Tensor, form: BlockFormat, n_bits: int, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(groups of x, float32 [..., groups, G]; their scales as stored [..., groups]; tensor_scale [])."""
    groups = blocked(x.float(), form)
    largest = groups.abs().amax(-1)
    if not form.per_tensor:
        tensor_scale = torch.ones((), device=x.device)
    elif tensor_scale is None:
        tensor_scale = choose_tensor_scale(largest.amax())
    return groups, choose_scale(largest, form, n_bits, tensor_scale), tensor_scale


def blocked(x: Tensor, form: BlockFormat) -> Tensor:
    """[..., C] -> [..., groups, G], zeros behind the last element of a row."""
    size = form.group_size or x.shape[-1]
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def choose_tensor_scale(largest: Tensor) -> Tensor:
    """The float32 scale that makes the group of the tensor's largest magnitude reach E4M3's largest scale."""
    return torch.where(largest > 0, largest / (E4M3_MAX * E2M1[-1]), 1.0).float()


def choose_scale(largest: Tensor, form: BlockFormat, n_bits: int, tensor_scale: Tensor) -> Tensor:
    """The stored scale of groups with these largest magnitudes."""
    if form.scale == "fp16":
        return as_half(largest / (2 ** (n_bits - 1) - 1))
    if form.scale == "e8m0":
        exponent = torch.frexp(largest).exponent - 1 - E2M1_EXPONENT  # frexp's mantissa is in [0.5, 1)
        biased = torch.where(largest > 0, exponent + E8M0_BIAS, 0)
        return biased.clamp(0, 2 * E8M0_BIAS).to(torch.uint8)
    return (largest / (E2M1[-1] * tensor_scale)).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def as_half(scale: Tensor) -> Tensor:
    """Positive scales as fp16; 0, of a group of zeros, becomes the smallest."""
    return scale.clamp(HALF_MIN, HALF_MAX).half()


def scale_values(scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """What stored scales stand for, float32."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.to(torch.int32) - E8M0_BIAS)
    return scale.float() * tensor_scale


def nearest(ratio: Tensor, form: BlockFormat, n_bits: int) -> Tensor:
    """The elements, as numbers, that are nearest to values in units of their scale; float32, larger ones saturate."""
    if form.element == "e2m1":
        return nearest_e2m1(ratio)
    top = 2 ** (n_bits - 1) - 1
    return ratio.round().clamp_(-top, top)


def nearest_e2m1(ratio: Tensor) -> Tensor:
    """To nearest, ties to the even code: numbers of E2M1 lie 1/2 apart below 2, 1 below 4 and 2 above."""
    size = ratio.abs()
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    return (ratio / step).round_().mul_(step).clamp_(-E2M1[-1], E2M1[-1])


def e2m1_codes(elements: Tensor) -> Tensor:
    """Codes 0..15, int8, of numbers of E2M1; zero is positive."""
    codes = torch.bucketize(elements.abs().contiguous(), torch.tensor(E2M1, device=elements.device))
    return (codes + 8 * (elements < 0)).to(torch.int8)


def e2m1_values(codes: Tensor) -> Tensor:
    """The numbers of E2M1 codes 0..15, float32."""
    points = torch.tensor(E2M1, device=codes.device)
    return torch.cat([points, -points])[codes.long()]
