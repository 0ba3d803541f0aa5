"""Bias correction of quantized layers: the mean error of their outputs (QBC), and one that looks ahead (ICQBC).

QBC: b = E[y - y^] per output channel. ICQBC also minimises what the next full-precision layers make of the error:
    L(b) = ||y - y^ - b||^2 / ||y||^2 + lambda ||f(y^ + b) - f(y)||^2 / ||f(y)||^2,
f being those layers. With lambda = 0 the minimum is QBC, which is then returned as it is. For a linear f that is so for
every lambda, since both terms are least at E[y - y^]: looking ahead pays through nonlinear layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.errors import UserError, check_choice
from dqbench.quant.capture import first_tensor
from dqbench.quant.layerwise import Visit, tap

TINY = 1e-30
MODES = ("none", "qbc", "icqbc")


@dataclass
class BiasRule:
    """mode: none | qbc | icqbc. strength: lambda; iters: of L-BFGS; create: give layers without a bias one.

    rows: about how many calibration rows L is taken on; QBC sees all that there are.
    """

    mode: str
    strength: float
    iters: int
    rows: int
    create: bool

    def __post_init__(self) -> None:
        check_choice("method.bias.mode", self.mode, MODES)
        for key, low in {"strength": 0, "iters": 1, "rows": 1}.items():
            if not low <= getattr(self, key) < float("inf"):
                raise UserError(f"method.bias.{key}={getattr(self, key)} is out of range; allowed: {low} or more")


def channel_axis(layer: nn.Module) -> int:
    """Where a conv's or linear layer's output has its channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def channel_sum(values: Tensor, axis: int) -> Tensor:
    """Sums over all but the channels, double [O]."""
    return values.double().movedim(axis, -1).flatten(0, -2).sum(0)


def broadcast(shift: Tensor, like: Tensor, axis: int) -> Tensor:
    """shift [O] with the dimensions of `like`."""
    return shift.reshape([-1 if k == axis % like.ndim else 1 for k in range(like.ndim)])


def qbc(wanted: Tensor, found: Tensor, axis: int) -> Tensor:
    """E[y - y^] per channel, [O], of y's dtype. wanted y, found y^: the channels at `axis`."""
    count = wanted.numel() // wanted.shape[axis]
    return (channel_sum(wanted - found, axis) / count).to(wanted.dtype)


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=TINY)


def icqbc(
    wanted: Tensor, found: Tensor, axis: int, following: Callable[[Tensor], Tensor], strength: float, iters: int
) -> Tensor:
    """The shift b, [O], of least L(b), from QBC's on by L-BFGS; QBC's where nothing better is found.

    following: f, differentiable, from outputs y to what the next layers make of them; strength: lambda.
    """
    start = qbc(wanted, found, axis)
    return start if strength == 0 else improve(start, wanted, found, axis, following, strength, iters)


def improve(
    start: Tensor, wanted: Tensor, found: Tensor, axis: int, following: Callable, strength: float, iters: int
) -> Tensor:
    """A shift of smaller L than `start`, or `start`."""
    with torch.no_grad():
        target = following(wanted)

    def loss(shift: Tensor) -> Tensor:
        shifted = found + broadcast(shift, found, axis)
        return relative(shifted, wanted) + strength * relative(following(shifted), target)

    shift = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([shift], max_iter=iters, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(shift)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return shift.detach() if loss(shift) < loss(start) else start


@contextmanager
def substituted(layer: nn.Module, output: Tensor) -> Iterator[None]:
    """Inside: `layer` returns `output`."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


def what_follows(
    unit: nn.Module, layer: nn.Module, calls: Sequence[tuple[Sequence[Any], dict[str, Any]]], first: Callable
) -> Callable[[Tensor], Tensor]:
    """f: what the unit returns when `layer` in it returns y, for the rows of the calls one after the other.

    calls: (args, kwargs) of the unit; first: the tensor in what it returns.
    """
    sizes: list[int] = []

    def sized(_: nn.Module, __: tuple, output: Tensor) -> None:
        sizes.append(len(output))

    handle = layer.register_forward_hook(sized)
    try:
        for args, kwargs in calls:
            unit(*args, **kwargs)
    finally:
        handle.remove()

    def following(y: Tensor) -> Tensor:
        parts = []
        for part, (args, kwargs) in zip(y.split(sizes), calls, strict=True):
            with substituted(layer, part):
                parts.append(first(unit(*args, **kwargs)))
        return torch.cat(parts)

    return following


def shift_bias(layer: nn.Module, shift: Tensor, create: bool) -> bool:
    """Add `shift` [O] to the layer's bias; where it has none, make it one if `create`. Returns whether it was added."""
    if layer.bias is None and not create:
        return False
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten()[: len(shift)]), requires_grad=False)
    layer.bias.data += shift.to(layer.bias.dtype)
    return True


def correct(visit: Visit, rule: BiasRule) -> None:
    """Correct the bias of a layer whose weight has just been quantized."""
    if rule.mode == "none" or visit.layer.bias is None and not rule.create:
        return
    ahead = rule.mode == "icqbc" and rule.strength > 0 and not visit.last  # what follows the last one is linear
    shift = looking_ahead(visit, rule) if ahead else mean_error(visit)
    shift_bias(visit.layer, shift, rule.create)


def mean_error(visit: Visit) -> Tensor:
    """QBC over all rows."""
    axis, total, count = channel_axis(visit.layer), 0.0, 0
    for wanted, found in compared(visit, visit.spans):
        total, count = total + channel_sum(wanted - found, axis), count + wanted.numel() // wanted.shape[axis]
    return (total / count).to(visit.layer.weight.dtype)


def looking_ahead(visit: Visit, rule: BiasRule) -> Tensor:
    """ICQBC over the first rows, from QBC over all rows on."""
    spans = visit.first_rows(rule.rows)
    wanted, found = (torch.cat(parts) for parts in zip(*compared(visit, spans), strict=True))
    calls = [visit.target.batch(rows, visit.device) for rows in spans]
    following = what_follows(visit.teacher, visit.exact, calls, first_tensor)
    axis = channel_axis(visit.layer)
    return improve(mean_error(visit), wanted, found, axis, following, rule.strength, rule.iters)


def compared(visit: Visit, spans: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
    """(full-precision output, quantized output behind quantized predecessors), span by span."""
    for rows in spans:
        _, wanted = tap(visit.teacher, visit.exact, *visit.target.batch(rows, visit.device))
        _, found = tap(visit.student, visit.layer, *visit.source.batch(rows, visit.device))
        yield wanted, found
