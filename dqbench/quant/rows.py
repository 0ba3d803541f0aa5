"""Rows of nested inputs and outputs on disk: one array for every tensor that holds a row per calibration sample."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten  # diffusers' outputs register here

from dqbench import processes
from dqbench.errors import UserError
from dqbench.shards import create_array


@dataclass(frozen=True)
class Stored:
    """Stands for a tensor whose values are rows of the array `name`."""

    name: str


def is_stored(leaf: Any) -> bool:
    """Whether a template's leaf stands for rows on disk."""
    return isinstance(leaf, Stored)


@dataclass
class Rows:
    """Arrays [N, ...] in one folder, memory-mapped, written in parts, read at random. Several processes share them."""

    folder: Path
    count: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def create(self, template: Any, example: Any) -> None:
        """Make room for every tensor that has a `Stored` in `template`; shapes and types are those in `example`."""
        stored = [pair for pair in zip(tree_leaves(template), tree_leaves(example), strict=True) if is_stored(pair[0])]
        processes.agreed(lambda: [self._reserve(mark.name, leaf) for mark, leaf in stored])
        for mark, leaf in stored:
            self.arrays[mark.name] = np.load(self.folder / f"{mark.name}.npy", mmap_mode="r+")
            self.dtypes[mark.name] = leaf.dtype

    def _reserve(self, name: str, values: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = storable(values[:1].detach().cpu()).numpy()
        create_array(self.folder / f"{name}.npy", content.dtype, (self.count, *content.shape[1:]))

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Store rows first.. of array `name`."""
        content = storable(values.detach().cpu()).numpy()
        self.arrays[name][first : first + len(content)] = content

    def read(self, name: str, rows: slice | np.ndarray, device: torch.device) -> Tensor:
        """A copy of chosen rows of array `name` on `device`, of the dtype that was written."""
        values = torch.from_numpy(self.arrays[name])
        chosen = values[rows].clone() if isinstance(rows, slice) else values.index_select(0, torch.from_numpy(rows))
        return chosen.to(device, self.dtypes[name])

    def store(self, template: Any, value: Any, first: int) -> None:
        """Write those tensors of `value` for which `template` has a `Stored`."""
        for mark, leaf in zip(tree_leaves(template), tree_leaves(value), strict=True):
            if is_stored(mark):
                self.write(mark.name, first, leaf)

    def load(self, template: Any, rows: slice | np.ndarray, device: torch.device) -> Any:
        """`template` with chosen rows in place of every `Stored`."""
        return tree_map(lambda leaf: self.read(leaf.name, rows, device) if is_stored(leaf) else leaf, template)

    def release(self) -> None:
        """Give the memory of the mapped pages back; their content stays in the files."""
        for array in self.arrays.values():
            array.base.madvise(mmap.MADV_DONTNEED)

    def drop(self) -> None:
        """Delete the files."""
        for name in list(self.arrays):
            del self.arrays[name]
            (self.folder / f"{name}.npy").unlink()


def storable(values: Tensor) -> Tensor:
    """`values` of a dtype that numpy has: bfloat16 becomes float32."""
    return values.float() if values.dtype == torch.bfloat16 else values


def template(name: str, one: Any, two: Any) -> Any:
    """`one` with a `Stored` in place of every tensor that holds one row per input: 1 long in `one`, 2 in `two`.

    one, two: nested tuples, lists, dicts and diffusers outputs, seen in passes over one and over two rows. The arrays
    are called `name`, `name[1]`, ... Raises UserError for a tensor that is neither per row nor constant.
    """
    leaves, spec = tree_flatten(one)
    count = 0
    for k, (leaf, other) in enumerate(zip(leaves, tree_leaves(two), strict=True)):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.ndim and (len(leaf), len(other)) == (1, 2):
            leaves[k] = Stored(f"{name}[{count}]" if count else name)
            count += 1
        elif leaf.shape != other.shape or not torch.equal(leaf, other):
            shape = list(other.shape)
            raise UserError(f"{name}: a tensor {shape} for 2 samples has no row per sample; choose other model.units")
    return tree_unflatten(leaves, spec)


@dataclass
class Call:
    """How a unit was called and, where asked for, what it returned, as templates of what lies in `rows`."""

    rows: Rows
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = field(default=None, kw_only=True)

    def batch(self, rows: slice | np.ndarray, device: torch.device) -> tuple[Sequence[Any], dict[str, Any]]:
        """(args, kwargs) of the unit for chosen rows."""
        return self.rows.load((self.args, self.kwargs), rows, device)
