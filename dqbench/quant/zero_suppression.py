"""Leading-zero suppression (LZS) of 8-bit codes: QuaRTZ (Kim et al. 2025, arXiv:2509.26436), and its integer matmul.

A group of G consecutive channels shares a flag F = max(29 - clz32(m), 0), m = the bitwise OR of the magnitudes, which
has the leading bit of the largest one; each code keeps its sign and the 3 bits above the F lowest.

| largest magnitude | 0-7 | 8-15 | 16-31 | 32-63 | 64-127 |
|-------------------|-----|------|-------|-------|--------|
| F                 | 0   | 1    | 2     | 3     | 4      |
| error of truncate | 0   | <= 1 | <= 3  | <= 7  | <= 15  |

rounding: truncate (the paper) keeps the 3 bits as they are; nearest is min(round(magnitude / 2^F), 7); midpoint
truncates, and decodes a code other than 0 to the middle of the magnitudes that share it. All three store the same.
Channels are the last dimension here; the last group of an odd number of channels is short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from dqbench.quant import packing

ROUNDINGS = ("truncate", "nearest", "midpoint")
QMAX = 127  # of stage 1: 7 bits of magnitude
CODE_MAX = 7  # of stage 2: 3 bits
CODE_BITS, FLAG_BITS = 4, 3
BOUNDS = (7, 15, 31, 63)  # largest magnitudes that F = 0, 1, 2, 3 can hold


def bits_per_element(channels: int, group_size: int) -> float:
    """4 bits for the code and 3 for the flag of each group: 4 + 3 / G where G divides the channels."""
    return CODE_BITS + FLAG_BITS * ceil(channels / group_size) / channels


def grouped(codes: Tensor, group_size: int) -> Tensor:
    """[..., C] -> [..., ceil(C / G), G], zeros behind the last channel."""
    padded = pad(codes, (0, -codes.shape[-1] % group_size))
    return padded.unflatten(-1, (-1, group_size))


def ungrouped(groups: Tensor, channels: int) -> Tensor:
    """[..., ceil(C / G), G] -> [..., C]."""
    return groups.flatten(-2)[..., :channels]


def choose_flags(codes: Tensor, group_size: int) -> Tensor:
    """The flag of each group: [..., C] in -127..127 -> uint8 [..., ceil(C / G)] in 0..4."""
    largest = grouped(codes, group_size).abs().amax(-1)
    bounds = torch.tensor(BOUNDS, device=codes.device, dtype=codes.dtype)
    return torch.bucketize(largest, bounds).to(torch.uint8)


def suppress(codes: Tensor, flags: Tensor, group_size: int, rounding: str) -> Tensor:
    """4-bit codes, int8 in -7..7, of 8-bit codes [..., C] with the flags of choose_flags()."""
    groups = grouped(codes.float(), group_size)
    return ungrouped(_encode(groups, _steps(flags), rounding), codes.shape[-1]).to(torch.int8)


def restore(codes: Tensor, flags: Tensor, group_size: int, rounding: str) -> Tensor:
    """The 8-bit codes that 4-bit codes [..., C] stand for, float32; with midpoint they may be halves."""
    groups = grouped(codes.float(), group_size)
    return ungrouped(_decode(groups, _steps(flags), rounding), codes.shape[-1])


def zero_suppress(codes: Tensor, group_size: int, rounding: str) -> Tensor:
    """restore(suppress(codes)) with the flags of codes [..., C], float32: what fake quantization needs."""
    groups, step = grouped(codes.float(), group_size), _steps(choose_flags(codes, group_size))
    return ungrouped(_decode(_encode(groups, step, rounding), step, rounding), codes.shape[-1])


def _steps(flags: Tensor) -> Tensor:
    return torch.exp2(flags.float()).unsqueeze(-1)


def _encode(groups: Tensor, step: Tensor, rounding: str) -> Tensor:
    ratio = groups / step
    return ratio.round_().clamp_(-CODE_MAX, CODE_MAX) if rounding == "nearest" else ratio.trunc_()


def _decode(whole: Tensor, step: Tensor, rounding: str) -> Tensor:
    return whole * step + whole.sign() * ((step - 1) / 2) if rounding == "midpoint" else whole * step


def pack(codes: Tensor, flags: Tensor) -> dict[str, Tensor]:
    """The bytes of 4-bit codes and their flags: two codes in one (sign and magnitude), eight flags in three."""
    nibbles = codes.abs() + 8 * (codes < 0)
    return {"codes": packing.pack(nibbles, CODE_BITS), "flags": packing.pack(flags, FLAG_BITS)}


def unpack(tensors: Mapping[str, Tensor], shape: Sequence[int], group_size: int) -> tuple[Tensor, Tensor]:
    """(codes, flags) as they went into pack(), the codes of this shape. UserError for another number of bytes."""
    *rows, channels = shape
    flag_shape = (*rows, ceil(channels / group_size))
    nibbles = packing.unpack(tensors["codes"], prod(shape), CODE_BITS)
    codes = torch.where(nibbles >= 8, -(nibbles & 7).to(torch.int8), nibbles.to(torch.int8))
    flags = packing.unpack(tensors["flags"], prod(flag_shape), FLAG_BITS)
    return codes.reshape(shape), flags.reshape(flag_shape)


def integer_matmul(codes: Tensor, flags: Tensor, weight: Tensor, group_size: int, rounding: str) -> Tensor:
    """restore(codes) @ weight.T in integers alone, int32 [T, O]; with midpoint in halves, that is twice the product.

    codes: [T, K] in -7..7; flags: [T, ceil(K / G)]; weight: integers [O, K]. Per group the 4-bit products are summed
    and the sum is shifted left by the row's flag: sum_g (sum_k c_tk w_ok) << F_tg. No int32 overflows up to K = 70,000
    with 8-bit weights. On a CPU: torch multiplies no int32 matrices elsewhere.
    """
    codes, shift, weight = codes.to(torch.int32), flags.to(torch.int32), weight.to(torch.int32)
    if rounding != "midpoint":
        return _shifted_sums(codes, shift, weight, group_size)
    # twice c 2^F + sgn(c) (2^F - 1) / 2 is (2 c + sgn(c)) 2^F - sgn(c)
    return _shifted_sums(2 * codes + codes.sign(), shift, weight, group_size) - codes.sign() @ weight.T


def _shifted_sums(codes: Tensor, shift: Tensor, weight: Tensor, group_size: int) -> Tensor:
    parts = zip(codes.split(group_size, 1), shift.split(1, 1), weight.split(group_size, 1), strict=True)
    total = torch.zeros(len(codes), len(weight), dtype=torch.int32)
    for own, flag, columns in parts:
        total += (own @ columns.T) << flag
    return total
