"""Layer by layer in execution order: what each layer receives behind quantized predecessors, and what it should return.

Units of a network are captured one after the other (capture.py), so that a pass costs the unit, not its prefix; within
a unit each layer sees the layers before it as they have become.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet, Chosen, named_generator
from dqbench.progress import track
from dqbench.quant.capture import Recorder, disk_allows, trace_units
from dqbench.quant.rows import Call
from dqbench.quant.time_bins import as_now, at_bins
from dqbench.stages import scratch


@dataclass(frozen=True)
class RowBins:
    """The bin of time, of `count`, that each calibration row is in: of_rows [N]."""

    of_rows: np.ndarray
    count: int

    @classmethod
    def one(cls, rows: int) -> RowBins:
        """The same parameters at all times."""
        return cls(np.zeros(rows, dtype=int), 1)

    def index(self, rows: slice, device: torch.device) -> Tensor:
        """Of some rows, [1] where all have the same bin, else [B]."""
        return as_now(self.of_rows[rows].tolist(), device).index

    def at(self, rows: slice, device: torch.device) -> AbstractContextManager[None]:
        """Inside: these rows pass a part of the network that is called alone."""
        return at_bins(self.of_rows[rows].tolist(), device)


class StudentRecorder(Recorder):
    """Its units have parameters per bin of time."""

    bins: RowBins

    def _returned(self, unit: nn.Module, call: Call, rows: slice) -> Any:
        with self.bins.at(rows, self.device):
            return super()._returned(unit, call, rows)


@dataclass(frozen=True)
class Visit:
    """One layer in its turn: both networks' unit around it, and how the unit was called."""

    name: str
    student: nn.Module  # the unit; the layer itself where it belongs to none
    teacher: nn.Module
    within: str  # the layer's name in the unit, "" for the unit itself
    last: bool  # nothing of the unit's layers comes after it
    source: Call  # of the student
    target: Call  # of the teacher
    spans: Sequence[slice]
    bins: RowBins

    @property
    def layer(self) -> nn.Module:
        return self.student.get_submodule(self.within)

    @property
    def exact(self) -> nn.Module:
        return self.teacher.get_submodule(self.within)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    def pairs(self, spans: Sequence[slice] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(input behind the quantized predecessors, full-precision output) of the layer, span by span."""
        for rows in self.spans if spans is None else spans:
            yield self.now(rows)[0], self.exactly(rows)[1]

    def now(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(input, output) of the layer as it and its predecessors are now."""
        with self.bins.at(rows, self.device):
            return tap(self.student, self.layer, *self.source.batch(rows, self.device))

    def exactly(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(input, output) of the layer in full precision."""
        return tap(self.teacher, self.exact, *self.target.batch(rows, self.device))

    def first_rows(self, count: int) -> list[slice]:
        """Spans of the first `count` rows, or of all there are."""
        return [slice(rows.start, min(rows.stop, count)) for rows in self.spans if rows.start < count]


class _Tapped(Exception):
    """Stops a unit once its layer has run."""


def tap(unit: nn.Module, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(input, output) of the first call of `layer` when `unit` is called; what comes after it does not run."""
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend([inputs[0], output])
        raise _Tapped

    handle = layer.register_forward_hook(take)
    try:
        with suppress(_Tapped):
            unit(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0], seen[1]


@torch.no_grad()
def visits(
    student: nn.Module,
    teacher: nn.Module,
    units: Mapping[str, Sequence[str]],
    calib: CalibrationSet,
    bins: RowBins | None = None,
) -> Iterator[Visit]:
    """Every layer of the units, in the order of execution; a layer that never runs is left out.

    What is done to the student's layer between two visits is what later layers see. bins: None for one.
    """
    bins = bins or RowBins.one(len(calib))
    order = list(trace_units(teacher, list(units), calib))
    ranks = {name: k for k, name in enumerate(trace_units(teacher, [n for own in units.values() for n in own], calib))}
    with recorders(student, teacher, order, calib) as (mine, exact):
        mine.bins = bins
        for unit in track(order, "layer by layer", len(order)):
            with TemporaryDirectory(dir=mine.outputs.folder.parent) as folder:
                source, target = mine.inputs(unit, Path(folder, "student")), exact.inputs(unit, Path(folder, "teacher"))
                names = sorted((name for name in units[unit] if name in ranks), key=ranks.get)
                for name in names:
                    within, last = name.removeprefix(unit).removeprefix("."), name == names[-1]
                    parts = (student.get_submodule(unit), teacher.get_submodule(unit))
                    yield Visit(name, *parts, within, last, source, target, [rows for _, rows in mine.spans()], bins)
                mine.remember(unit, source)
                exact.remember(unit, target)


@contextmanager
def recorders(
    student: nn.Module, teacher: nn.Module, order: Sequence[str], calib: CalibrationSet
) -> Iterator[tuple[StudentRecorder, Recorder]]:
    """Recorders of both networks on temporary files; outputs are kept for replay where the disk allows."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=scratch("activations-on-disk"))))
        replay = disk_allows(folder, 2 * len(calib) * sum(trace_units(teacher, order, calib).values()))
        mine = StudentRecorder(student, calib, folder / "student", replay)
        yield mine, Recorder(teacher, calib, folder / "teacher", replay)


def spread_rows(calib: CalibrationSet, count: int) -> CalibrationSet:
    """`count` rows, evenly spread over the set, shuffled so that any of them are at all times; all if it has fewer."""
    chosen = np.linspace(0, len(calib) - 1, min(count, len(calib))).round().astype(int)
    order = torch.randperm(len(chosen), generator=named_generator("layer by layer", calib.seed)).numpy()
    index = chosen[order]
    return replace(
        calib, inputs={key: Chosen(values, index) for key, values in calib.inputs.items()}, step=calib.step[index]
    )
