"""What a task of a Slurm job array does: run one cell as a command of its own, and be requeued when its time is up."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission

from dqbench.launching.command import cell_command

STOP_S = 20  # a cell that has not ended by then is killed; nothing finished is lost either way
SETTLE_S = 1  # what ended the cell may have been meant for the task as well, and reach it last
WARNING = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")  # sent by Slurm some time before the end


@dataclass
class Task:
    """One cell. submitit calls it on the node, and checkpoint() when Slurm warns of the end."""

    overrides: list[str]
    processes: int
    folder: str  # where the sweep was started

    def __call__(self) -> None:
        """Run the cell; end with its exit status."""
        command = cell_command(self.overrides, self.processes)
        print(f"{self.folder}$ {shlex.join(command)}", flush=True)
        self.ending, self.process = False, subprocess.Popen(command, cwd=self.folder, preexec_fn=ignore_warning)
        signal.signal(signal.SIGTERM, self.end)
        with suppress(ChildProcessError):  # a signal's handler has waited for it
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # holds no lock that the handlers need
        if status := self.process.wait():
            time.sleep(SETTLE_S)
            while self.ending:  # cancelled or preempted: Slurm decides whether the task is queued again
                signal.pause()
            sys.exit(status if status > 0 else 128 - status)

    def end(self, number: int, frame: object) -> None:
        """Slurm's SIGTERM."""
        self.ending = True
        self.process.terminate()

    def checkpoint(self) -> DelayedSubmission:
        """Stop the cell; what it has finished lies on disk, and the same task goes on from there."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return DelayedSubmission(replace(self))


def ignore_warning() -> None:
    """In the cell's processes: Slurm warns them all, but the task acts."""
    signal.signal(WARNING, signal.SIG_IGN)
