"""Inputs and outputs of reconstruction units over a calibration set, on disk, each unit computed once.

In execution order the units before the current one are replayed: their forward returns the stored output, so that a
pass up to unit k costs the glue between units (norms, concatenations), not the prefix of the network. Several processes
divide the rows among them and share the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # diffusers' outputs register here

from dqbench import processes
from dqbench.calibration import CalibrationSet
from dqbench.errors import UserError
from dqbench.quant.rows import Call, Rows, storable, template

BATCH = 64  # rows of one capturing forward; stored rows do not depend on who asks for them
PROBES = (slice(0, 1), slice(0, 2))  # passes that show which tensors hold one row per input


class _Reached(Exception):
    """Stops a forward pass once its unit has been reached."""


class Recorder:
    """Runs one network over a calibration set and stores what its units receive and return.

    `folder` holds the stored outputs of `replayed` units; with `replay` False nothing is kept and each pass runs the
    whole prefix, as it must when units are not taken in execution order, or when the disk budget forbids.
    """

    def __init__(self, model: nn.Module, calib: CalibrationSet, folder: Path, replay: bool) -> None:
        if len(calib) < 2:
            raise UserError(f"reconstruction needs 2 calibration samples or more, got {len(calib)}")
        self.model, self.calib, self.replay = model, calib, replay
        self.device = next(model.parameters()).device
        self.outputs = Rows(folder, len(calib))
        self.units: dict[str, nn.Module] = {}
        self.templates: dict[str, Any] = {}

    def spans(self) -> list[tuple[int, slice]]:
        """This process's consecutive row ranges of the calibration set."""
        firsts = list(range(0, len(self.calib), BATCH))
        return [(first, slice(first, min(first + BATCH, len(self.calib)))) for first in processes.split(firsts)]

    @torch.no_grad()
    def inputs(self, name: str, folder: Path, with_output: bool = False) -> Call:
        """The recorded call of unit `name`; `with_output` also stores what it returns as `output` beside the inputs."""
        one, two = (self._watch(name, rows, with_output) for rows in PROBES)
        args, kwargs = template("input", one[:2], two[:2])
        call = Call(Rows(folder, len(self.calib)), args, kwargs, output=template("output", one[2], two[2]))
        call.rows.create((args, kwargs, call.output), two)
        for first, rows in self.spans():
            call.rows.store((args, kwargs, call.output), self._watch(name, rows, with_output), first)
            self.outputs.release()
            call.rows.release()
        processes.wait()
        return call

    @torch.no_grad()
    def remember(self, name: str, call: Call) -> None:
        """Store what unit `name` now returns for its recorded inputs, and replay it from here on."""
        if not self.replay:
            return
        unit = self.model.get_submodule(name)
        one, two = (self._returned(unit, call, rows) for rows in PROBES)
        self.templates[name] = template(name, one, two)
        self.outputs.create(self.templates[name], two)
        for first, rows in self.spans():
            self.outputs.store(self.templates[name], self._returned(unit, call, rows), first)
            self.outputs.release()
            call.rows.release()
        processes.wait()
        self.units[name] = unit

    def _returned(self, unit: nn.Module, call: Call, rows: slice) -> Any:
        if call.output is not None:
            return call.rows.load(call.output, rows, torch.device("cpu"))
        args, kwargs = call.batch(rows, self.device)
        return unit(*args, **kwargs)

    @torch.no_grad()
    def remember_all(self, names: Sequence[str], as_stored: bool = False) -> None:
        """Store the outputs of several units in one pass: what a resumed run needs of the units it has finished.

        as_stored: the units see their inputs as remember() shows them, contiguous as they lie on disk; else as they
        come. Other strides would choose other kernels, which round otherwise.
        """
        if not self.replay or not names:
            return
        one, two = (self._watch_all(names, rows, as_stored) for rows in PROBES)
        self.templates = {name: template(name, one[name], two[name]) for name in names}
        for name in names:
            self.outputs.create(self.templates[name], two[name])
        for first, rows in self.spans():
            for name, output in self._watch_all(names, rows, as_stored).items():
                self.outputs.store(self.templates[name], output, first)
            self.outputs.release()
        processes.wait()
        self.units = {name: self.model.get_submodule(name) for name in names}

    def _watch(self, name: str, rows: slice, with_output: bool) -> tuple[tuple, dict[str, Any], Any]:
        """(args, kwargs, output or None) of unit `name` in a pass over `rows`."""
        with self._replaying(rows), _watching(self.model.get_submodule(name), with_output) as seen:
            self._forward(rows)
        return seen["args"], seen["kwargs"], seen.get("output")

    def _watch_all(self, names: Sequence[str], rows: slice, as_stored: bool) -> dict[str, Any]:
        """The outputs of the units in a pass over `rows` that ends at the last of them."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(_contiguous(self.model.get_submodule(name), as_stored))
            watching = {
                name: stack.enter_context(_watching(self.model.get_submodule(name), True, stop=name == names[-1]))
                for name in names
            }
            self._forward(rows)
        return {name: seen["output"] for name, seen in watching.items()}

    def _forward(self, rows: slice) -> None:
        try:
            self.model(**self.calib.rows(np.arange(rows.start, rows.stop), self.device))
        except _Reached:
            return
        raise RuntimeError("the unit was not reached: is it part of the denoiser's forward pass?")

    @contextmanager
    def _replaying(self, rows: slice) -> Iterator[None]:
        for name, unit in self.units.items():
            unit.forward = self._replay(name, rows)
        try:
            yield
        finally:
            for unit in self.units.values():
                del unit.forward

    def _replay(self, name: str, rows: slice) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.outputs.load(self.templates[name], rows, self.device)


@contextmanager
def _watching(unit: nn.Module, with_output: bool, stop: bool = True) -> Iterator[dict[str, Any]]:
    """Record one call of `unit` and stop the forward pass there: before it runs, or after for its output."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)
        if not with_output:
            raise _Reached

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen["output"] = output
        if stop:
            raise _Reached

    handles = [unit.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [unit.register_forward_hook(after, with_kwargs=True)] if with_output else []
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _contiguous(unit: nn.Module, inputs: bool) -> Iterator[None]:
    """Let `unit` return what a replayed one does, tensors as they lie on disk; with `inputs` take such tensors too."""

    def plain(value: Any) -> Any:
        return tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, value)

    handles = [unit.register_forward_hook(lambda module, args, output: plain(output))]
    if inputs:
        handles.append(unit.register_forward_pre_hook(lambda *call: plain(call[1:]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """A unit's output as one tensor: itself, or the first in a tuple or a diffusers output."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise UserError(f"a unit returns {type(output).__name__}, in which no tensor is found; choose other model.units")


@torch.no_grad()
def trace_units(model: nn.Module, names: Sequence[str], calib: CalibrationSet) -> dict[str, int]:
    """`names` in the order of their first call in a forward pass -> bytes of their stored output per row.

    Those that are never called are left out.
    """
    sizes: dict[str, int] = {}

    def sizer(name: str) -> Callable:
        def size(module: nn.Module, args: tuple, output: Any) -> None:
            first_tensor(output)  # raises for what cannot be reconstructed
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            sizes.setdefault(name, sum(storable(tensor).nbytes for tensor in tensors))

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
