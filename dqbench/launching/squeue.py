"""What Slurm's queue says. It needs no accounting (sacct), and forgets a job some minutes after its end."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence

ENDED = {  # states a job does not leave
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
SQUEUE = ("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%N|%r")
log = logging.getLogger("dqbench")


def look() -> dict[str, tuple[str, str]] | None:
    """Job id -> (state, node or reason) of the user's jobs; None, with a warning, where Slurm does not answer."""
    done = subprocess.run(SQUEUE, capture_output=True, text=True)
    if done.returncode:
        log.warning("squeue does not answer (%s); asking again", " ".join(done.stderr.split()))
        return None
    jobs = (line.split("|") for line in done.stdout.splitlines())
    return {job: (state, node or reason) for job, state, node, reason in jobs}


def is_alive(state: str | None) -> bool:
    """Whether a job in this state, None where the queue has forgotten it, may still do something."""
    return state is not None and state not in ENDED


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, running or not."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
