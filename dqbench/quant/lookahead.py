"""The loss of ICQBC, which looks ahead to what the next full-precision layers make of a quantized layer's error:

L = ||y - y^||^2 / ||y||^2 + lambda ||f(y^) - f(y)||^2 / ||f(y)||^2, f being those layers; and its descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30


@dataclass(frozen=True)
class Lookahead:
    """L of an output y^, with f(y) known. following: f, differentiable; strength: lambda."""

    wanted: Tensor
    ahead: Tensor
    following: Callable[[Tensor], Tensor]
    strength: float

    @classmethod
    def of(cls, wanted: Tensor, following: Callable[[Tensor], Tensor], strength: float) -> Lookahead:
        with torch.no_grad():
            return cls(wanted, following(wanted), following, strength)

    def __call__(self, found: Tensor) -> Tensor:
        return relative(found, self.wanted) + self.strength * relative(self.following(found), self.ahead)


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=TINY)


def descend(start: Sequence[Tensor], loss: Callable[..., Tensor], iters: int) -> list[Tensor]:
    """Tensors at which loss(*tensors) is smaller than at `start`, by L-BFGS; `start` where none are found."""
    found = [value.detach().clone().requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(found, max_iter=iters, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*found)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    found = [value.detach() for value in found]
    with torch.no_grad():
        return found if loss(*found) < loss(*start) else list(start)


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
