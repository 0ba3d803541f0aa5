"""Progress of the stages on stderr: a bar in a terminal; elsewhere lines when a stage ends and now and then.

A process that a launcher started tells that one, too: in the file that the variable STATUS names.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dqbench import processes

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 60
SECONDS_BETWEEN_STATUSES = 0.2
STATUS = "DQBENCH_STATUS"  # environment variable: the file in which a launcher reads how far this process is
log = logging.getLogger(__name__)


def track(items: Iterable[Item], description: str, total: int, done: int = 0) -> Iterator[Item]:
    """Iterate, showing how far it is; an item that is a range counts as its length. Of several processes one shows."""
    if not processes.is_main():
        return iter(items)
    console = Console(stderr=True)
    if console.is_terminal:
        return _bar(items, description, total, done, console)
    return _lines(_told(items, description, total, done), description, total, done)


def tell_launcher(stage: str, done: int = 0, total: int | None = None) -> None:
    """Let the launcher know what this cell does. Without a launcher, and in a group's other processes, nothing."""
    if not (name := os.environ.get(STATUS)) or os.environ.get("RANK", "0") != "0":
        return
    file, temporary = Path(name), Path(f"{name}.tmp")
    with suppress(OSError):  # a display is worth no failed run
        temporary.write_text(json.dumps({"stage": stage, "done": done, "total": total}))
        temporary.replace(file)


def _told(items: Iterable[Item], description: str, total: int, done: int) -> Iterator[Item]:
    told = float("-inf")
    for item in items:
        if (now := time.monotonic()) - told >= SECONDS_BETWEEN_STATUSES:
            tell_launcher(description, done, total)
            told = now
        yield item
        done += _size(item)
    tell_launcher(description, done, total)


def _lines(items: Iterable[Item], description: str, total: int, done: int) -> Iterator[Item]:
    started = told = time.monotonic()
    for item in items:
        yield item
        done += _size(item)
        now = time.monotonic()
        if done >= total or now - told >= SECONDS_BETWEEN_LINES:
            log.info("%-24s %d of %d in %.0f s", description, done, total, now - started)
            told = now


def _size(item: object) -> int:
    return len(item) if isinstance(item, range) else 1


def _bar(items: Iterable[Item], description: str, total: int, done: int, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task, _size(item))
