"""A cell's processes end with the launcher that started them, however that one ends: SIGKILL leaves none behind."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

LAUNCHER = "DQBENCH_LAUNCHER"  # process id of the launcher, in the environment of all processes of a cell
SECONDS_BETWEEN_LOOKS = 0.5


def end_with_launcher() -> None:
    """In a process of a launched cell: exit as soon as the launcher, or the process that started this one, is gone."""
    if (launcher := os.environ.get(LAUNCHER)) is None:
        return
    for pid in {int(launcher), os.getppid()}:
        threading.Thread(target=_exit_after, args=(pid,), daemon=True, name=f"lifeline-{pid}").start()


def _exit_after(pid: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)  # as after SIGKILL: locks are let go, what is finished stays
