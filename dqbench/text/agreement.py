"""How far a quantized language model's predictions are from full precision's, by how much of the row is masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqbench import processes
from dqbench.text.likelihood import Masks, batches


@dataclass(frozen=True)
class Agreement:
    """Means over the masked tokens of a row's draws in each range of the masked fraction, float64 [N, bins].

    same: share of tokens whose most probable prediction is full precision's; kl: KL(full precision || quantized), nats.
    NaN where a row is too short for a range.
    """

    same: Tensor
    kl: Tensor


@torch.no_grad()
def agreement(
    teacher: nn.Module, student: nn.Module, input_ids: Tensor, masks: Masks, bins: int, batch_size: int = 64
) -> Agreement:
    """Compare two networks on rows [N, L] under the masks that bin_masks() made for as many bins."""
    count, draws = masks.weight.shape
    totals = torch.zeros(2, count * draws, dtype=torch.float64)
    for batch in batches(student, input_ids, masks, None, batch_size):
        expected, found = batch.of(teacher).log_softmax(-1), batch.of(student).log_softmax(-1)
        same = (expected.argmax(-1) == found.argmax(-1)).double()
        kl = (expected.exp() * (expected - found)).sum(-1).double()
        totals.index_add_(1, batch.draw, torch.stack([same, kl]).cpu())
    totals = processes.add_up(totals)
    means = (totals.view(2, count, draws) * masks.weight).view(2, count, bins, -1).mean(-1)
    means[:, ~masks.masked.view(count, bins, -1).any(-1)] = torch.nan
    return Agreement(*means)
