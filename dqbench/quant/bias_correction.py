"""Bias correction of quantized layers: the mean error of their outputs (QBC), and one that looks ahead (ICQBC).

QBC: b = E[y - y^] per output channel. ICQBC minimises the loss of lookahead.py over b, and where asked for over the
weight's centroids, their codes given. With lambda = 0 it is QBC exactly. For a linear f the best b is QBC's for every
lambda, since both terms are least at E[y - y^]: looking ahead pays through nonlinear layers, and through centroids.
Either may have a bias of its own per bin of diffusion time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dqbench.errors import UserError, check_choice
from dqbench.quant.added_bias import aligned, channel_axis, shift_output
from dqbench.quant.capture import first_tensor
from dqbench.quant.codebook import Codebook
from dqbench.quant.layerwise import Visit
from dqbench.quant.lookahead import Lookahead, descend, what_follows
from dqbench.quant.sparse_compute import apply

MODES = ("none", "qbc", "icqbc")


@dataclass
class BiasRule:
    """mode: none | qbc | icqbc. strength: lambda; iters: of L-BFGS; centroids: ICQBC learns them, too.

    rows: how many calibration rows L is taken on; QBC sees all that there are. create: give layers without a bias
    one; per_bin: a bias for each bin of time beside the layer's own.
    """

    mode: str
    strength: float
    iters: int
    rows: int
    centroids: bool
    create: bool
    per_bin: bool

    def __post_init__(self) -> None:
        check_choice("method.bias.mode", self.mode, MODES)
        for key, low in {"strength": 0, "iters": 1, "rows": 1}.items():
            if not low <= getattr(self, key) < float("inf"):
                raise UserError(f"method.bias.{key}={getattr(self, key)} is out of range; allowed: {low} or more")
        if self.centroids and self.mode != "icqbc":
            raise UserError(f"method.bias.centroids has no effect with method.bias.mode={self.mode}; allowed: icqbc")

    def corrects(self, layer: nn.Module) -> bool:
        """Whether the layer has, or is to have, a bias that may be changed."""
        return self.mode != "none" and (layer.bias is not None or self.create)

    def added(self, layer: nn.Module, bins: int) -> int:
        """Numbers that correct() adds to a layer, at `bins` bins of time."""
        count = bins if self.per_bin else 1
        return count * len(layer.weight) if self.corrects(layer) and (count > 1 or layer.bias is None) else 0


def correct(visit: Visit, rule: BiasRule, book: Codebook | None) -> int:
    """Correct what a layer returns whose weight has just been quantized, to `book` where that is to centroids.

    Returns how many numbers that adds to the layer.
    """
    if not rule.corrects(visit.layer):
        return 0
    shift = mean_error(visit)
    if rule.mode == "icqbc" and rule.strength > 0 and not visit.last:  # what follows the last one is linear
        shift = looking_ahead(visit, rule, shift, book if rule.centroids else None)
    return shift_output(visit.layer, shift)


def qbc(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """E[y - y^] per channel, [O], of y's dtype. wanted y, found y^: the channels at `axis`."""
    return channels_last(wanted - found, axis).mean(0).to(wanted.dtype)


def channels_last(values: Tensor, axis: int) -> Tensor:
    """Double [N, O]: a line for all that has channels, in the order of the rows."""
    return values.double().movedim(axis, -1).flatten(0, -2)


def mean_error(visit: Visit) -> Tensor:
    """QBC over all rows, [K, O] for K bins of time; a bin without rows has the mean of all."""
    axis, outputs = channel_axis(visit.layer), len(visit.layer.weight)
    total = torch.zeros(visit.bins.count, outputs, dtype=torch.float64, device=visit.device)
    count = torch.zeros(visit.bins.count, 1, dtype=torch.float64, device=visit.device)
    for rows in visit.spans:
        wanted, _, found = compared(visit, rows)
        error, index = channels_last(wanted - found, axis), visit.bins.index(rows, visit.device)
        for k in index.unique():
            own = error if len(index) == 1 else error[index.repeat_interleave(len(error) // len(index)) == k]
            total[k], count[k] = total[k] + own.sum(0), count[k] + len(own)
    return torch.where(count > 0, total / count, total.sum(0) / count.sum()).to(visit.layer.weight.dtype)


def looking_ahead(visit: Visit, rule: BiasRule, shift: Tensor, book: Codebook | None) -> Tensor:
    """The shift [K, O] of ICQBC, from QBC's on, over the first rows; a layer with a `book` gets its best centroids."""
    spans = visit.first_rows(rule.rows)
    wanted, x, found = (torch.cat(parts) for parts in zip(*(compared(visit, rows) for rows in spans), strict=True))
    calls = [visit.target.batch(rows, visit.device) for rows in spans]
    following = what_follows(visit.teacher, visit.exact, calls, first_tensor)
    loss = Lookahead.of(wanted, following, rule.strength)
    axis, index = channel_axis(visit.layer), visit.bins.index(slice(0, spans[-1].stop), visit.device)
    if book is not None:
        return learn_centroids(visit.layer, book, x, loss, shift, index, rule.iters)
    return improve(shift, found, loss, index, axis, rule.iters)


def improve(shift: Tensor, found: Tensor, loss: Lookahead, index: Tensor, axis: int, iters: int) -> Tensor:
    """A shift [K, O] of y^ `found`, of smaller L than `shift`, or `shift`; index: bins of the rows."""
    return descend([shift], lambda b: loss(found + aligned(b, index, found, axis)), iters)[0]


def icqbc(
    wanted: Tensor, found: Tensor, axis: int, following: Callable[[Tensor], Tensor], strength: float, iters: int
) -> Tensor:
    """The shift b, [O], of least L, from QBC's on; QBC's where nothing better is found.

    following: f, differentiable, from outputs y to what the next layers make of them; strength: lambda.
    """
    start = qbc(wanted, found, axis)
    if strength == 0:
        return start
    loss, index = Lookahead.of(wanted, following, strength), torch.zeros(1, dtype=torch.long)
    return improve(start[None], found, loss, index, axis, iters)[0]


def learn_centroids(
    layer: nn.Module, book: Codebook, x: Tensor, loss: Lookahead, shift: Tensor, index: Tensor, iters: int
) -> Tensor:
    """Give `layer`, on inputs x, the centroids of least L together with a shift [K, O], which is returned."""
    axis = channel_axis(layer)

    def loss_of(b: Tensor, centroids: Tensor) -> Tensor:
        weight = replace(book, centroids=centroids).dequantize().reshape(layer.weight.shape).to(layer.weight.dtype)
        found = apply(layer, weight, layer.bias, x)
        return loss(found + aligned(b, index, found, axis))

    start = [shift, book.centroids.float()]
    better, centroids = descend(start, loss_of, iters)
    stored = centroids.half()
    if not stored.isfinite().all() or loss_of(better, stored.float()) >= loss_of(*start):
        return shift
    replace(book, centroids=stored).ordered().install(layer)
    return better


def compared(visit: Visit, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(full-precision output, input behind quantized predecessors, quantized output) of the layer."""
    _, wanted = visit.exactly(rows)
    return wanted, *visit.now(rows)
