"""Arrays on disk in shards of rows: written batch by batch, resumed at the first missing row, read by memory map."""

from __future__ import annotations

import bisect
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dqbench import processes
from dqbench.progress import track

log = logging.getLogger(__name__)


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file whole or not at all; a full disk is an OSError that says so (np.save's own does not)."""
    content = io.BytesIO()
    np.save(content, values)
    partial = path.with_suffix(".tmp")
    try:
        partial.write_bytes(content.getbuffer())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def create_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new memory-mapped .npy file, disk space reserved: a full disk is an OSError here, not a signal later."""
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return rows


@dataclass(frozen=True)
class Shards:
    """One array [N, ...] kept as `NAME.<first>-<end>.npy` files. Shard sizes may differ."""

    folder: Path
    name: str

    def spans(self) -> list[tuple[int, int]]:
        """The (first, end) row ranges that are on disk, ascending."""
        stems = (path.name.split(".")[-2] for path in self.folder.glob(f"{self.name}.*.npy"))
        return sorted(tuple(int(part) for part in stem.split("-")) for stem in stems)

    def path(self, first: int, end: int) -> Path:
        """The file of rows first..end-1."""
        return self.folder / f"{self.name}.{first:07d}-{end:07d}.npy"

    def write(self, first: int, rows: np.ndarray) -> None:
        """Store rows [n, ...] as first..first+n-1, atomically."""
        save_array(self.path(first, first + len(rows)), rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...) of the whole array."""
        return (self.spans()[-1][1], *self._maps[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The element type."""
        return self._maps[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """One row, as a view of the memory map."""
        shard = bisect.bisect_right(self._starts, row) - 1
        return self._maps[shard][row - self._starts[shard]]

    def read(self) -> np.ndarray:
        """All rows [N, ...]: the memory map itself where there is one shard, else a copy in memory."""
        return self._maps[0] if len(self._maps) == 1 else np.concatenate(self._maps)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [first for first, _ in self.spans()]

    @functools.cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(self.path(*span), mmap_mode="r") for span in self.spans()]


def missing(spans: list[tuple[int, int]], count: int, batch_size: int) -> Iterator[range]:
    """Batches of at most `batch_size` consecutive rows of 0..count-1 that no span covers."""
    done = np.zeros(count, dtype=bool)
    for first, end in spans:
        done[first:end] = True
    first = 0
    while first < count:
        end = first
        while end < count and end - first < batch_size and not done[end]:
            end += 1
        if end > first:
            yield range(first, end)
        first = max(end, first + 1)


def arrays(folder: Path) -> dict[str, Shards]:
    """The arrays that are kept in `folder`, by name."""
    return {
        name: Shards(folder, name) for name in sorted({path.name.rsplit(".", 2)[0] for path in folder.glob("*.*.npy")})
    }


def fill(
    folder: Path, count: int, batch_size: int, produce: Callable[[range], dict[str, np.ndarray]], title: str
) -> None:
    """Write rows 0..count-1 of the arrays that `produce(rows)` returns by name, missing batches only, showing progress.

    An empty file `<first>-<end>.done` follows the arrays of a batch. Several processes divide the batches among them:
    the batches, and so the rounding, are those of one process.
    """
    spans = processes.agreed(lambda: finished_spans(folder))
    batches = list(missing(spans, count, batch_size))
    done, own = sum(end - first for first, end in spans), processes.split(batches)
    if (several := processes.count()) > 1:
        title = f"{title}, 1 of {several}"
        if len(batches) < several:
            log.info("%s processes: sampler.batch_size leaves work for %d", title, len(batches))
    for rows in track(own, title, done + sum(map(len, own)), done):
        for name, values in produce(rows).items():
            Shards(folder, name).write(rows.start, values)
        (folder / f"{rows.start:07d}-{rows.stop:07d}.done").touch()
    processes.wait()


def finished_spans(folder: Path) -> list[tuple[int, int]]:
    """The (first, end) of finished batches; what a killed attempt wrote of others is dropped."""
    spans = sorted(tuple(map(int, path.stem.split("-"))) for path in folder.glob("*-*.done"))
    for array in arrays(folder).values():
        for span in set(array.spans()) - set(spans):
            array.path(*span).unlink()
    return spans
