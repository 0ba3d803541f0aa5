"""How far a quantized language model's predictions are from full precision's, by how much of the row is masked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqbench import processes
from dqbench.text.likelihood import Masks, batches

BATCH = 64


@dataclass(frozen=True)
class Agreement:
    """Means over the masked tokens of a row's draws in each range of the masked fraction, float64 [N, bins].

    same: share of tokens whose most probable prediction is full precision's; kl: KL(full precision || quantized), nats.
    NaN where a row is too short for a range.
    """

    same: Tensor
    kl: Tensor


@torch.no_grad()
def predictions(network: nn.Module, input_ids: Tensor, masks: Masks) -> Iterator[Tensor]:
    """Log-probabilities of the masked tokens, float32 [M, V], batch by batch as agreement() takes them."""
    for batch in batches(network, input_ids, masks, None, BATCH):
        yield batch.of(network).log_softmax(-1)


@torch.no_grad()
def agreement(expected: Iterable[Tensor], student: nn.Module, input_ids: Tensor, masks: Masks, bins: int) -> Agreement:
    """Compare a network with another one's predictions() on rows [N, L], under bin_masks() for as many bins."""
    count, draws = masks.weight.shape
    totals = torch.zeros(2, count * draws, dtype=torch.float64)
    for batch, exact in zip(batches(student, input_ids, masks, None, BATCH), expected, strict=True):
        found = batch.of(student).log_softmax(-1)
        exact = exact.to(found.device)
        same = (exact.argmax(-1) == found.argmax(-1)).double()
        kl = (exact.exp() * (exact - found)).sum(-1).double()
        totals.index_add_(1, batch.draw, torch.stack([same, kl]).cpu())
    totals = processes.add_up(totals)
    means = (totals.view(2, count, draws) * masks.weight).view(2, count, bins, -1).mean(-1)
    means[:, ~masks.masked.view(count, bins, -1).any(-1)] = torch.nan
    return Agreement(*means)
