"""Progress of the stages on stderr: a bar in a terminal; elsewhere lines when a stage ends and now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dqbench import processes

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 60
log = logging.getLogger(__name__)


def track(items: Iterable[Item], description: str, total: int, done: int = 0) -> Iterator[Item]:
    """Iterate, showing how far it is; an item that is a range counts as its length. Of several processes one shows."""
    if not processes.is_main():
        return iter(items)
    console = Console(stderr=True)
    if console.is_terminal:
        return _bar(items, description, total, done, console)
    return _lines(items, description, total, done)


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
