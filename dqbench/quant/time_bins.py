"""Which bin of diffusion time each row of a forward pass is in, for parameters that change with time.

One TimeBins hangs, as an activation quantizer does, on the layer through which a network learns what time it is: the
first linear layer behind an image model's timestep embedding (the sine of the slowest frequency grows with t), or the
token embedding of a masked-diffusion language model (time is the share of tokens that are masked). It changes nothing;
it makes the bins of its rows current for the rest of the pass, wherever the network is called from. `at_bin` and
`at_bins` choose for a part that is called alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.errors import UserError
from dqbench.quant.attach import attach_act_quantizer
from dqbench.quant.quantizers import from_spec


class Now(NamedTuple):
    """The bin of each row: index [1] where all have the same, else [B]."""

    index: Tensor
    rows: tuple[int, ...]


_now: ContextVar[Now] = ContextVar("time_bin")


@dataclass(frozen=True)
class Measure:
    """How time is read off a layer's input: a column of an embedding [B, D], or how many ids [B, L] are mask_id."""

    column: int | None
    mask_id: int | None

    def times(self, x: Tensor) -> np.ndarray:
        """Of each row, double [B]."""
        time = x[:, self.column] if self.mask_id is None else (x == self.mask_id).double().mean(dim=1)
        return time.double().cpu().numpy()


class TimeBins(nn.Module):
    """Bins between `edges`, ascending: bin k holds edges[k - 1] < time <= edges[k], the first and last are open.

    So a time that calibration never saw is in the nearest bin. inner: what else is done to the layer's input, or None.
    """

    n_bits = 32  # of a layer whose input is read and not quantized

    def __init__(self, edges: Sequence[float], measure: Measure, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.edges, self.measure, self.inner = tuple(edges), measure, inner
        self.register_buffer("scale", torch.zeros(0), persistent=False)

    @property
    def count(self) -> int:
        return len(self.edges) + 1

    def forward(self, x: Tensor) -> Tensor:
        """x: what the layer receives."""
        self.turn(x)
        return x if self.inner is None else self.inner(x)

    @torch.compiler.disable
    def turn(self, x: Tensor) -> None:
        """Make the bins of the rows of x current."""
        _now.set(as_now(np.searchsorted(self.edges, self.measure.times(x)).tolist(), x.device))

    def spec(self) -> dict[str, Any]:
        """What rebuilds this module before its buffers are loaded."""
        inner = self.inner.spec() if self.inner is not None else None
        return {"kind": "time_bins", "edges": list(self.edges), "measure": asdict(self.measure), "inner": inner}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TimeBins:
        """The module that spec() described."""
        inner = from_spec(spec["inner"]) if spec["inner"] is not None else None
        return cls(spec["edges"], Measure(**spec["measure"]), inner)

    def extra_repr(self) -> str:
        return f"edges={list(self.edges)}, {self.measure}"


def as_now(bins: Sequence[int], device: torch.device | str) -> Now:
    """The bins of the rows as an index on `device`."""
    rows = tuple(bins) if len(set(bins)) > 1 else (bins[0],)
    return Now(torch.tensor(rows, device=device), rows)


@torch.compiler.disable
def current() -> Now:
    """The bins of the running forward pass."""
    try:
        return _now.get()
    except LookupError:
        raise RuntimeError("no forward pass has told the time yet; call the whole network, or use at_bin()") from None


@contextmanager
def at_bin(k: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside: bin k is current, until a whole network is called."""
    with at_bins([k], device):
        yield


@contextmanager
def at_bins(bins: Sequence[int], device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside: these are the bins of the rows, until a whole network is called."""
    token = _now.set(as_now(list(bins), device))
    try:
        yield
    finally:
        _now.reset(token)


def find_clock(network: nn.Module) -> tuple[str, Measure]:
    """(name of the layer that is told the time, how to read it). Raises UserError for a network without one."""
    slowest = None
    for name, layer in network.named_modules():
        if isinstance(layer, Timesteps):
            half = layer.num_channels // 2
            slowest = 2 * half - 1 if layer.flip_sin_to_cos else half - 1
        if isinstance(layer, TimestepEmbedding) and slowest is not None:
            return f"{name}.linear_1", Measure(slowest, None)
        if isinstance(layer, nn.Embedding) and getattr(network.config, "mask_token_id", None) is not None:
            return name, Measure(None, network.config.mask_token_id)
    kind = type(network).__name__
    raise UserError(f"{kind} has no timestep embedding and no mask token to tell the time by; use method.act.bins=1")


@contextmanager
def telling(network: nn.Module, edges: Sequence[float]) -> Iterator[None]:
    """Inside: the network's forward tells the bins between `edges`; without any there is nothing to tell."""
    with ExitStack() as stack:
        if edges:
            name, measure = find_clock(network)
            layer, clock = network.get_submodule(name), TimeBins(edges, measure)
            stack.callback(layer.register_forward_pre_hook(lambda _, args: clock.turn(args[0])).remove)
        yield


def bins_of(network: nn.Module, calib: CalibrationSet, edges: Sequence[float]) -> np.ndarray:
    """The bin of each calibration row, [N]."""
    return np.searchsorted(edges, calibration_times(network, calib))


class _Told(Exception):
    """Stops a forward pass when the time is known."""


def stop_with(take: Callable[[Tensor], None]) -> Callable:
    """A hook that hands a layer's input to `take` and stops the pass."""

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        take(args[0])
        raise _Told

    return stop


@torch.no_grad()
def calibration_times(network: nn.Module, calib: CalibrationSet) -> np.ndarray:
    """The time of each calibration row, [N], as the network is told it."""
    name, measure = find_clock(network)
    found: list[np.ndarray] = []
    handle = network.get_submodule(name).register_forward_pre_hook(stop_with(lambda x: found.append(measure.times(x))))
    try:
        for batch in calib.batches(next(network.parameters()).device):
            with suppress(_Told):
                network(**batch)
    finally:
        handle.remove()
    return np.concatenate(found)


def equal_mass_edges(values: np.ndarray, count: int) -> list[float]:
    """At most count - 1 edges, midway between neighbouring values, with about as many of `values` [N] in each bin."""
    ordered, distinct, edges = np.sort(values), np.unique(values), set()
    for k in range(1, count):
        place = np.searchsorted(distinct, ordered[round(k * len(ordered) / count) - 1])
        if place + 1 < len(distinct):
            edges.add(float(distinct[place] + distinct[place + 1]) / 2)
    return sorted(edges)


def choose_edges(network: nn.Module, calib: CalibrationSet, count: int) -> list[float]:
    """Edges of at most `count` bins of equal mass over the calibration set."""
    return equal_mass_edges(calibration_times(network, calib), count) if count > 1 else []


def attach_bins(network: nn.Module, edges: Sequence[float]) -> None:
    """Let the network's forward tell the bins; what quantizes that layer's input already goes on doing so."""
    name, measure = find_clock(network)
    layer = network.get_submodule(name)
    if hasattr(layer, "act_quantizer"):
        layer.act_quantizer = TimeBins(edges, measure, layer.act_quantizer)
    else:
        attach_act_quantizer(layer, TimeBins(edges, measure), "input")
