"""How modules are called: recorded from the calls of what holds them, and handed on from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.errors import UserError
from dqbench.quant.capture import first_tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]  # how a module is called: args, kwargs


@dataclass(frozen=True)
class NetworkCalls:
    """How a whole network is called: by the batches of a calibration set."""

    calib: CalibrationSet
    device: torch.device

    def __iter__(self) -> Iterator[Call]:
        return (((), batch) for batch in self.calib.batches(self.device))


@dataclass
class LayerInputs:
    """How the next decoder layer is called, batch by batch: hidden states [B, L, D], and what all layers get alike."""

    hidden: list[Tensor]
    others: list[Call]

    def __iter__(self) -> Iterator[Call]:
        for x, (args, kwargs) in zip(self.hidden, self.others, strict=True):
            yield (x, *args), kwargs

    @torch.no_grad()
    def advance(self, layer: nn.Module) -> None:
        """Replace every input by what `layer` makes of it."""
        for i, (args, kwargs) in enumerate(self):
            self.hidden[i] = first_tensor(layer(*args, **kwargs))


def first_inputs(network: nn.Module, name: str, batches: Iterable[dict[str, Tensor]]) -> LayerInputs:
    """What the first decoder layer, `name`, is called with; the rest of the network does not run."""
    hidden, others = [], []
    for batch in batches:
        (x, *args), kwargs = call_of(network, network.get_submodule(name), ((), batch))
        hidden.append(x)
        others.append((tuple(args), kwargs))
    return LayerInputs(hidden, others)


def stages_of(module: nn.Module, names: Sequence[str], call: Call) -> list[list[str]]:
    """`names` in the order of their first call, those together that read one tensor in one way.

    Raises UserError for a layer that does not run.
    """
    stages: dict[tuple[Any, ...], list[str]] = {}
    alive, seen = [], set()  # tensors are told apart by address: none may be freed on the way

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in seen:
                seen.add(name)
                alive.append(args[0])
                stages.setdefault((id(args[0]), *geometry(layer)), []).append(name)

        return record

    handles = [module.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in names]
    try:
        module(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    if idle := [name for name in names if name not in seen]:
        raise UserError(f"{', '.join(idle)}: not run in the forward pass, nothing can calibrate it; add to method.skip")
    return list(stages.values())


def geometry(layer: nn.Module) -> tuple[Any, ...]:
    """How a layer reads its input: equal for layers whose rows (hessian.rows_of) are the same."""
    keys = ("kernel_size", "dilation", "padding", "stride")
    return (type(layer), *(getattr(layer, key, None) for key in keys))


def input_of(module: nn.Module, name: str, call: Call) -> Tensor:
    """The input of the layer `name` when `module` is called; the pass ends there."""
    return call_of(module, module.get_submodule(name), call)[0][0]


class _Reached(Exception):
    """Stops a forward pass at the module whose call is wanted."""


def call_of(module: nn.Module, inner: nn.Module, call: Call) -> Call:
    """How `inner` is called when `module` is; the forward pass ends there."""
    seen: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = inner.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        module(*call[0], **call[1])
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise UserError(f"{type(inner).__name__} is not run in the forward pass of {type(module).__name__}")
