"""The cells of a sweep side by side, each in a slot of the pool: what hydra/launcher=accelerate does."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, configure_log
from omegaconf import DictConfig

from dqbench.errors import one_line
from dqbench.identity import digest, plain
from dqbench.launching.board import Board, board
from dqbench.launching.cells import cells, is_finished, run_folder
from dqbench.launching.children import Child, kill, start, terminate
from dqbench.launching.command import Job, jobs_of, returned
from dqbench.launching.pool import Slot, cores, environment
from dqbench.stages import SHARED

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_DIE = 5  # of a killed process, on a machine that is very busy


def launch(
    sweep: DictConfig, overrides: Sequence[Sequence[str]], first: int, slots: Sequence[Slot], grace: float
) -> list[JobReturn]:
    """Run the sweep's cells first, first + 1, ... of launching.cells. A cell that fails is told."""
    configure_log(sweep.hydra.hydra_logging, sweep.hydra.verbose)
    logging.getLogger("dqbench").setLevel(logging.INFO)
    configs = cells[first : first + len(overrides)]
    jobs = jobs_of(sweep, overrides, configs)
    pending = [job for job in jobs if job.cfg.runtime.force or not is_finished(job.cfg)]
    slots = slots[: len(pending)]
    with tempfile.TemporaryDirectory(prefix="dqbench-") as statuses, board(len(pending)) as shown:
        SideBySide(spread(pending), list(slots), shown, Path(statuses), grace).run()
    return returned(overrides, configs)


def spread(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, those first that have least in common: cells that share a trajectory would wait for each other."""
    seen: Counter[str] = Counter()
    ranked = []
    for job in jobs:
        shared = digest([plain(job.cfg.model), plain(job.cfg.sampler), job.cfg.seed])
        ranked.append((seen[shared], job))
        seen[shared] += 1
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]


def claim(job: Job) -> FileLock | None:
    """The right to start a cell, held until it has ended; None while another launcher has it."""
    folder = Path(job.cfg.paths.cache) / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"launch-{job.name}", mode=SHARED)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


@dataclass
class SideBySide:
    """Jobs that wait, slots that are free, cells at work."""

    waiting: list[Job]
    free: list[Slot]
    board: Board
    statuses: Path
    grace: float
    running: list[Child] = field(default_factory=list)
    claims: dict[str, FileLock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parallel = len(self.free)

    def run(self) -> None:
        """Until all have ended. Signals that ask the program to end become KeyboardInterrupt, once none is at work."""
        with caught(signal.SIGINT, signal.SIGTERM) as signals:
            try:
                while (self.waiting or self.running) and not signals:
                    self.fill()
                    self.collect()
                    self.board.show(self.running)
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                self.stop(signals)
        if signals:
            raise KeyboardInterrupt

    def fill(self) -> None:
        """Put waiting cells into the free slots."""
        for job in list(self.waiting):
            if not self.free:
                return
            try:
                self.take(job)
            except OSError as error:
                self.waiting.remove(job)
                self.board.lost(job, one_line(error))

    def take(self, job: Job) -> None:
        """Start a cell; one that another sweep has at work goes on waiting, one that it has finished is done."""
        if (right := claim(job)) is None:
            return
        if is_finished(job.cfg, anew=True) and not job.cfg.runtime.force:
            right.release()
            self.board.finished(job, "by another sweep")
        else:
            self.begin(job)
            self.claims[job.name] = right
        self.waiting.remove(job)

    def begin(self, job: Job) -> None:
        """Start a cell; with runtime.force its old row goes: no row is better than one of an earlier attempt."""
        if job.cfg.runtime.force:
            (run_folder(job.cfg) / "row.json").unlink(missing_ok=True)
        child = start(job, self.free[0], environment(self.free[0], self.parallel, os.environ, cores()), self.statuses)
        del self.free[0]
        self.running.append(child)
        self.board.started(child)

    def collect(self) -> None:
        """Take note of cells that have ended."""
        for child in [child for child in self.running if child.process.poll() is not None]:
            self.running.remove(child)
            self.free.append(child.slot)
            self.claims.pop(child.job.name).release()
            if child.process.returncode == 0 or is_finished(child.job.cfg):
                self.board.finished(child.job, f"in {time.monotonic() - child.began:.0f} s")
            else:
                self.board.lost(child.job, child.reason())

    def stop(self, signals: Sequence[int]) -> None:
        """Ask the cells at work to end, kill those that have not after the grace time or at a second signal."""
        alive = terminate(self.running)
        deadline, asked = time.monotonic() + self.grace, len(signals)
        while alive and time.monotonic() < deadline and len(signals) == asked:
            for child in self.running:
                child.process.poll()
            _, alive = psutil.wait_procs(alive, timeout=SECONDS_BETWEEN_LOOKS)
        kill(alive)
        psutil.wait_procs(alive, timeout=SECONDS_TO_DIE)
        for child in self.running:
            child.process.wait()
        for right in self.claims.values():
            right.release()


@contextmanager
def caught(*numbers: int) -> Iterator[list[int]]:
    """The signals of these kinds that arrive, collected instead of acted upon."""
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
