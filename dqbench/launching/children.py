"""A cell as a process group: started with its log file, watched, ended with all that it has started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dqbench.launching.command import Job, cell_command
from dqbench.launching.lifeline import LAUNCHER
from dqbench.launching.logs import last_words
from dqbench.launching.pool import Slot
from dqbench.progress import STATUS


@dataclass(frozen=True)
class Child:
    """A job at work. printed: length of its log before it began."""

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    status_file: Path
    printed: int
    began: float  # time.monotonic()

    @property
    def status(self) -> dict[str, Any]:
        """{stage, done, total} as progress.tell_launcher() left it; empty before the first."""
        try:
            return json.loads(self.status_file.read_text())
        except (OSError, ValueError):
            return {}

    def reason(self) -> str:
        """Why it failed, on one line: its own last word, else the signal or exit status it ended with."""
        lines = self.job.log.read_bytes()[self.printed :].decode(errors="replace").splitlines()
        own = [found[1] for line in lines if (found := re.match(rf"dqbench: run {self.job.name} failed: (.*)", line))]
        told = own or last_words(lines)
        code = self.process.returncode
        if code < 0:
            killed = f"killed by {signal.Signals(-code).name}"
            return f"{killed}, as the system does where memory runs out" if code == -signal.SIGKILL else killed
        return told[-1] if told else f"exit status {code}"


def start(job: Job, slot: Slot, environment: Mapping[str, str], statuses: Path) -> Child:
    """Start the job in a session of its own, so that a terminal's Ctrl-C reaches the launcher alone."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    status_file = statuses / f"{job.name}.json"
    own = {LAUNCHER: str(os.getpid()), STATUS: str(status_file)}
    with job.log.open("ab") as log:
        printed = log.tell()
        process = subprocess.Popen(
            cell_command(job.overrides, slot.processes),
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Child(job, slot, process, status_file, printed, time.monotonic())


def family(child: Child) -> set[psutil.Process]:
    """The child's process and all below it, whatever session they moved to (accelerate's have their own)."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(child.process.pid)
        return {top, *top.children(recursive=True)}
    return set()


def terminate(children: Iterable[Child]) -> set[psutil.Process]:
    """Ask each child to end (accelerate passes it on). Returns the processes that should be gone soon."""
    alive = set().union(*map(family, children))
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    return alive


def kill(processes: Iterable[psutil.Process]) -> None:
    """End the processes that still run, and what they have started since."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for one in [*process.children(recursive=True), process]:
                one.kill()
