"""What a person sees of cells that run side by side: a line for each in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from dqbench.launching.children import Child
from dqbench.launching.command import Job

SECONDS_BETWEEN_LINES = 60
LABEL, STAGE = 48, 28  # characters of a terminal's line
log = logging.getLogger("dqbench")


class Board:
    """Counts the cells of a sweep and tells what happens to them; `total` of them are to run."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.progress, self.done, self.failed, self.total = progress, 0, 0, total
        self.lines: dict[str, TaskID] = {}
        self.told = time.monotonic()
        self.overall = progress.add_task(self.counts, total=total, stage="")

    @property
    def counts(self) -> str:
        """How many are done, failed, still to go."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.total} done{failed}, {self.total - self.done - self.failed} to go"

    def started(self, child: Child) -> None:
        """A cell begins."""
        job = child.job
        self.lines[job.name] = self.progress.add_task(job.label, total=None, stage="starts")
        if self.progress.disable:
            where = f" on GPU {','.join(child.slot.devices)}" if child.slot.devices else ""
            log.info("%s starts%s: %s", job.name, where, job.label)

    def show(self, running: Collection[Child]) -> None:
        """How far the running cells are: at once in a terminal, elsewhere now and then."""
        if not self.progress.disable:
            for child in running:
                self._show(self.lines[child.job.name], child.status)
        elif time.monotonic() - self.told >= SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            log.info("%s; %s", self.counts, ", ".join(map(standing, running)) or "another sweep has the rest at work")

    def _show(self, line: TaskID, status: dict) -> None:
        if status:
            self.progress.update(line, stage=status["stage"], completed=status["done"], total=status["total"])

    def finished(self, job: Job, how: str) -> None:
        """A cell has its row. how: by whom, or in how many seconds."""
        self.done += 1
        self._ended(job)
        log.info("%s is done %s (%s); %s", job.name, how, job.label, self.counts)

    def lost(self, job: Job, reason: str) -> None:
        """A cell failed."""
        self.failed += 1
        self._ended(job)
        log.error("run %s failed: %s (%s); log: %s; %s", job.name, reason, job.label, job.log, self.counts)

    def _ended(self, job: Job) -> None:
        if job.name in self.lines:
            self.progress.remove_task(self.lines.pop(job.name))
        self.progress.update(self.overall, description=self.counts, completed=self.done + self.failed)


def standing(child: Child) -> str:
    """'name: stage 40 %'"""
    status = child.status
    share = f" {100 * status['done'] / status['total']:.0f} %" if status.get("total") else ""
    return f"{child.job.name}: {status.get('stage', 'starts')}{share}"


@contextmanager
def board(total: int) -> Iterator[Board]:
    """A board that is drawn while the `with` block runs; drawn only in a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=LABEL, overflow="ellipsis")),
        TextColumn("{task.fields[stage]}", table_column=Column(no_wrap=True, width=STAGE, overflow="ellipsis")),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Board(total, progress)
