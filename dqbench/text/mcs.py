"""Mask-based calibration: rows of text as a masked-diffusion sampler shows them (Quant-dLLM, arXiv:2510.03274, MCS).

The first floor(gamma L) tokens stay visible. At time t in (0, 1] every other one is [MASK] with probability t.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from dqbench.calibration import named_generator
from dqbench.errors import UserError, check_choice

MODES = ("none", "per_sample_grid", "cross")


@dataclass(frozen=True)
class MaskedRows:
    """Masked token ids [R, L], and each row's masking probability t [R], 0 where nothing is masked."""

    ids: Tensor
    ratio: Tensor


def mask_rows(ids: Tensor, mode: str, gamma: float, times: int, mask_id: int, seed: int) -> MaskedRows:
    """Token ids [N, L] as calibration rows.

    per_sample_grid (release): row i at t = (i + 1) / N, R = N; `times` is not used. cross (paper): every row at each of
    t = 1/T, ..., 1, T = times, R = N T, row by row. none: as they are. A row's masks depend on the seed, its number and
    t's number alone.
    """
    check(ids, mode, gamma, times)
    if mode == "none":
        return MaskedRows(ids.clone(), torch.zeros(len(ids)))
    visible = floor(gamma * ids.shape[1] + 1e-9)
    masked, ratios = [], []
    for row, t, name in draws(len(ids), mode, times):
        hidden = torch.rand(ids.shape[1], generator=named_generator(f"mcs/{name}", seed)) < t
        hidden[:visible] = False
        masked.append(ids[row].masked_fill(hidden.to(ids.device), mask_id))
        ratios.append(t)
    return MaskedRows(torch.stack(masked), torch.tensor(ratios))


def draws(count: int, mode: str, times: int) -> Iterator[tuple[int, float, str]]:
    """(row, t, name of its draw) of every masked row."""
    for row in range(count):
        if mode == "per_sample_grid":
            yield row, (row + 1) / count, str(row)
        else:
            yield from ((row, (k + 1) / times, f"{row}/{k}") for k in range(times))


def check(ids: Tensor, mode: str, gamma: float, times: int) -> None:
    """Raise UserError for what cannot be masked."""
    check_choice("mcs.mode", mode, MODES)
    if ids.ndim != 2 or not len(ids):
        raise UserError(f"rows of token ids must be [N, L] with N of 1 or more, got {list(ids.shape)}")
    if not (0 <= gamma < 1):
        raise UserError(f"mcs.gamma={gamma} is out of range; allowed: 0 to less than 1")
    if mode == "cross" and times < 1:
        raise UserError(f"mcs.times={times} is out of range; allowed: 1 or more")
