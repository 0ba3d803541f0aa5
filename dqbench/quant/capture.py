"""Inputs and outputs of reconstruction units over a calibration set, on disk, each unit computed once.

In execution order the units before the current one are replayed: their forward returns the stored output, so that a
pass up to unit k costs the glue between units (norms, concatenations), not the prefix of the network.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.shards import create_array

BATCH = 64  # rows of one capturing forward; stored rows do not depend on who asks for them


class _Reached(Exception):
    """Stops a forward pass once its unit has been reached."""


@dataclass
class Rows:
    """Arrays [N, ...] in one folder, written in order, read at random, memory-mapped."""

    folder: Path
    count: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Store rows first.. of array `name`, created on its first write."""
        values = values.detach().cpu()
        if name not in self.arrays:
            self.folder.mkdir(parents=True, exist_ok=True)
            file, shape = self.folder / f"{name}.npy", (self.count, *values.shape[1:])
            self.arrays[name] = create_array(file, np.dtype(str(values.dtype)[6:]), shape)
        self.arrays[name][first : first + len(values)] = values.numpy()

    def read(self, name: str, rows: slice | np.ndarray, device: torch.device) -> Tensor:
        """A copy of chosen rows of array `name` on `device`."""
        values = torch.from_numpy(self.arrays[name])
        chosen = values[rows].clone() if isinstance(rows, slice) else values.index_select(0, torch.from_numpy(rows))
        return chosen.to(device)

    def release(self) -> None:
        """Give the memory of the mapped pages back; their content stays in the files."""
        for array in self.arrays.values():
            array.base.madvise(mmap.MADV_DONTNEED)

    def drop(self) -> None:
        """Delete the files."""
        for name in list(self.arrays):
            del self.arrays[name]
            (self.folder / f"{name}.npy").unlink()


@dataclass
class Call:
    """How a unit was called: every argument is `Stored` (its rows are in `rows` under that name) or a constant."""

    rows: Rows
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def batch(self, rows: slice | np.ndarray, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) of the unit for chosen rows."""

        def value(item: Any) -> Any:
            return self.rows.read(item.name, rows, device) if isinstance(item, Stored) else item

        return [value(item) for item in self.args], {key: value(item) for key, item in self.kwargs.items()}

    def record(self, first: int, args: tuple, kwargs: dict[str, Any], batch_size: int) -> None:
        """Store the rows first.. of a call's tensor arguments."""
        self.args = [self._item(f"arg{i}", item, first, batch_size) for i, item in enumerate(args)]
        self.kwargs = {key: self._item(key, item, first, batch_size) for key, item in kwargs.items()}

    def _item(self, name: str, item: Any, first: int, batch_size: int) -> Any:
        if not isinstance(item, Tensor) or item.ndim == 0 or len(item) != batch_size:
            return item
        self.rows.write(name, first, item)
        return Stored(name)


@dataclass(frozen=True)
class Stored:
    """Marks an argument whose values are rows of the array `name`."""

    name: str


class Recorder:
    """Runs one network over a calibration set and stores what its units receive and return.

    `folder` holds the stored outputs of `replayed` units; with `replay` False nothing is kept and each pass runs the
    whole prefix, as it must when units are not taken in execution order, or when the disk budget forbids.
    """

    def __init__(self, model: nn.Module, calib: CalibrationSet, folder: Path, replay: bool) -> None:
        self.model, self.calib, self.replay = model, calib, replay
        self.device = next(model.parameters()).device
        self.outputs = Rows(folder, len(calib))
        self.units: dict[str, nn.Module] = {}

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Consecutive row ranges of the calibration set."""
        for first in range(0, len(self.calib), BATCH):
            yield first, slice(first, min(first + BATCH, len(self.calib)))

    @torch.no_grad()
    def inputs(self, name: str, folder: Path, with_output: bool = False) -> Call:
        """The recorded call of unit `name`; `with_output` also stores what it returns as `output` beside the inputs."""
        unit = self.model.get_submodule(name)
        call = Call(Rows(folder, len(self.calib)))
        for first, rows in self.spans():
            batch_size = rows.stop - rows.start
            with self._replaying(rows), _watching(unit, with_output) as seen:
                self._forward(rows)
            call.record(first, seen["args"], seen["kwargs"], batch_size)
            if with_output:
                call.rows.write("output", first, seen["output"])
            self.outputs.release()
            call.rows.release()
        return call

    @torch.no_grad()
    def remember(self, name: str, call: Call) -> None:
        """Store what unit `name` now returns for its recorded inputs, and replay it from here on."""
        if not self.replay:
            return
        unit = self.model.get_submodule(name)
        for first, rows in self.spans():
            if "output" in call.rows.arrays:
                self.outputs.write(name, first, torch.from_numpy(np.array(call.rows.arrays["output"][rows])))
            else:
                args, kwargs = call.batch(rows, self.device)
                self.outputs.write(name, first, first_tensor(unit(*args, **kwargs)))
            self.outputs.release()
            call.rows.release()
        self.units[name] = unit

    @torch.no_grad()
    def remember_all(self, names: Sequence[str]) -> None:
        """Store the outputs of several units in one pass: what a resumed run needs of the units it has finished."""
        if not self.replay or not names:
            return
        units = {name: self.model.get_submodule(name) for name in names}
        for first, rows in self.spans():
            with ExitStack() as stack:
                seen = {
                    name: stack.enter_context(_watching(unit, True, stop=name == names[-1]))
                    for name, unit in units.items()
                }
                self._forward(rows)
            for name in names:
                self.outputs.write(name, first, seen[name]["output"])
        self.units.update(units)

    def _forward(self, rows: slice) -> None:
        try:
            self.model(**self.calib.rows(np.arange(rows.start, rows.stop), self.device))
        except _Reached:
            return
        raise RuntimeError("the unit was not reached: is it part of the denoiser's forward pass?")

    @contextmanager
    def _replaying(self, rows: slice) -> Iterator[None]:
        for name, unit in self.units.items():
            unit.forward = _returning(self.outputs, name, rows, self.device)
        try:
            yield
        finally:
            for unit in self.units.values():
                del unit.forward


def _returning(outputs: Rows, name: str, rows: slice, device: torch.device) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: outputs.read(name, rows, device)


@contextmanager
def _watching(unit: nn.Module, with_output: bool, stop: bool = True) -> Iterator[dict[str, Any]]:
    """Record one call of `unit` and stop the forward pass there: before it runs, or after for its output."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)
        if not with_output:
            raise _Reached

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen["output"] = first_tensor(output)
        if stop:
            raise _Reached

    handles = [unit.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [unit.register_forward_hook(after, with_kwargs=True)] if with_output else []
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """A unit's output as one tensor: itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def trace_units(model: nn.Module, names: Sequence[str], calib: CalibrationSet) -> dict[str, int]:
    """`names` in the order of their first call in a forward pass -> bytes of their output per row.

    Those that are never called are left out.
    """
    sizes: dict[str, int] = {}

    def sizer(name: str) -> Callable:
        def size(module: nn.Module, args: tuple, output: Any) -> None:
            tensor = first_tensor(output)
            sizes.setdefault(name, tensor.numel() * tensor.element_size())

        return size

    handles = [model.get_submodule(name).register_forward_hook(sizer(name)) for name in names]
    try:
        model(**calib.rows(np.arange(1), next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def disk_allows(folder: Path, bytes_needed: int) -> bool:
    """Whether files of that size take at most half of the free disk at `folder`."""
    return bytes_needed <= shutil.disk_usage(folder).free / 2
