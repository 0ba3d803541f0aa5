"""A bound on the negative log-likelihood of a masked-diffusion language model, by Monte Carlo.

Every draw masks some of a row's target tokens and adds up their cross-entropy, weighted so that the expectation is the
bound, in nats per row. It bounds from above: it is no perplexity to compare with an autoregressive model's. Masks
depend on (seed, row) alone: a full-precision and a quantized network see the same and differ by what was quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbench import processes
from dqbench.calibration import named_generator
from dqbench.errors import UserError
from dqbench.text.networks import token_logits


@dataclass(frozen=True)
class Masks:
    """masked: which tokens each draw hides, bool [N, D, L]; weight: of their summed cross-entropy, float64 [N, D]."""

    masked: Tensor
    weight: Tensor


def count_masks(target: Tensor, draws: int, seed: int) -> Masks:
    """LLaDA's: of T target tokens (bool [N, L]) exactly l are masked, weight T / l; l is stratified over 1..T.

    l = (k - 1 + floor(i T / D)) mod T + 1 for draw i, k uniform on 1..T: every l is equally likely in every draw. The
    release rounds instead of flooring, which favors some l where D does not divide T.
    """
    return _draw(target, "likelihood", seed, partial(_count_row, draws=draws))


def rate_masks(target: Tensor, draws: int, seed: int, eps: float = 1e-3) -> Masks:
    """Dream's: each target token (bool [N, L]) is masked with probability p = (1 - eps) t + eps, weight 1 / p.

    t = (u + i / D) mod 1 for draw i, u uniform. Dream's release leaves the first and the last token out of the target.
    """
    return _draw(target, "likelihood", seed, partial(_rate_row, draws=draws, eps=eps))


def bin_masks(target: Tensor, bins: int, draws: int, seed: int) -> Masks:
    """`draws` draws for each of `bins` equal ranges of the masked fraction l / T, (0, 1/bins] first: D = bins * draws.

    Weight 1 / l, for means over masked tokens. A range that no l of a short row falls into masks nothing.
    """
    return _draw(target, "agreement", seed, partial(_bin_row, bins=bins, draws=draws))


@torch.no_grad()
def nll_bound(
    network: nn.Module, input_ids: Tensor, masks: Masks, attention_mask: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """Estimates of the bound, nats, float64 [N, D], for rows [N, L]; their mean over D is a row's bound."""
    values = torch.zeros(masks.weight.shape, dtype=torch.float64)
    for batch in batches(network, input_ids, masks, attention_mask, batch_size):
        loss = F.cross_entropy(batch.of(network), batch.truth, reduction="none").double().cpu()
        values.view(-1).index_add_(0, batch.draw, loss)
    return processes.add_up(values) * masks.weight


def per_token(values: Tensor, target: Tensor) -> Tensor:
    """Bits per target token, [N], from estimates [N, D] in nats."""
    return values.mean(1) / target.sum(1).to(values) / torch.log(torch.tensor(2.0, dtype=values.dtype))


@dataclass(frozen=True)
class MaskedBatch:
    """Rows [B, L] with masks in, and what they hide, one entry per masked token, [M]: its place, truth and draw."""

    input_ids: Tensor
    attention_mask: Tensor | None
    masked: Tensor  # bool [B, L]
    truth: Tensor
    draw: Tensor  # position in the flattened [N, D], on the CPU

    def of(self, network: nn.Module) -> Tensor:
        """What the network predicts for the masked tokens, float32 [M, V]."""
        return token_logits(network, self.input_ids, self.attention_mask)[self.masked].float()


def batches(
    network: nn.Module, input_ids: Tensor, masks: Masks, attention_mask: Tensor | None, batch_size: int
) -> Iterator[MaskedBatch]:
    """All draws of all rows that mask anything, `batch_size` at a time, on the network's device.

    Several processes divide the batches among them: what they make of a draw is 0 in all but one.
    """
    draws, device = masks.weight.shape[1], next(network.parameters()).device
    input_ids, masked = input_ids.cpu(), masks.masked.flatten(0, 1)
    for chosen in processes.split(masked.any(1).nonzero()[:, 0].split(batch_size)):
        rows, hidden = input_ids[chosen // draws], masked[chosen]
        noisy = rows.masked_fill(hidden, network.config.mask_token_id)
        attended = None if attention_mask is None else attention_mask[chosen // draws].to(device)
        draw = chosen.repeat_interleave(hidden.sum(1))
        yield MaskedBatch(noisy.to(device), attended, hidden.to(device), rows[hidden].to(device), draw)


def _draw(target: Tensor, purpose: str, seed: int, row: Callable[..., tuple[Tensor, Tensor]]) -> Masks:
    """The masks that `row(target [L], generator)` draws for each row, from a generator of its own."""
    if not target.any(1).all():
        raise UserError(f"row {int((~target.any(1)).nonzero()[0])} has no target token; each row needs at least one")
    drawn = [row(one, named_generator(f"{purpose}/{i}", seed)) for i, one in enumerate(target.cpu())]
    masked, weight = zip(*drawn, strict=True)
    return Masks(torch.stack(masked), torch.stack(weight))


def _count_row(target: Tensor, generator: torch.Generator, draws: int) -> tuple[Tensor, Tensor]:
    length = int(target.sum())
    first = int(torch.randint(length, (), generator=generator))
    counts = (first + torch.arange(draws) * length // draws) % length + 1
    return choose(target, counts, generator), length / counts.double()


def _rate_row(target: Tensor, generator: torch.Generator, draws: int, eps: float) -> tuple[Tensor, Tensor]:
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    p = (1 - eps) * ((offset + torch.arange(draws, dtype=torch.float64) / draws) % 1) + eps
    hidden = torch.rand(draws, len(target), generator=generator, dtype=torch.float64) < p[:, None]
    return hidden & target, 1 / p


def _bin_row(target: Tensor, generator: torch.Generator, bins: int, draws: int) -> tuple[Tensor, Tensor]:
    edges = (torch.arange(bins + 1) * int(target.sum()) // bins)[:, None]
    low, high = edges[:-1], edges[1:]
    u = torch.rand(bins, draws, generator=generator, dtype=torch.float64)
    counts = torch.where(high > low, low + 1 + (u * (high - low)).long(), 0).flatten()
    return choose(target, counts, generator), 1 / counts.double().clamp(min=1)


def choose(target: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Random subsets of the target [L] of counts [D] tokens each, bool [D, L]."""
    scores = torch.rand(len(counts), len(target), generator=generator, dtype=torch.float64).masked_fill(~target, 2.0)
    return scores.argsort(1).argsort(1) < counts[:, None]
