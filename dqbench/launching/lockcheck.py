"""Whether locks on a shared file system hold between machines: srun -N 2 python -m dqbench.launching.lockcheck FOLDER

Exit status: 0 they do, 1 they do not, 2 bad input (also: no other process was met, so nothing is known).
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dqbench.commands import command
from dqbench.errors import UserError
from dqbench.stages import taking_turns

ROUNDS, HOLD_S, APART_S = 200, 0.01, 0.01


def meet(folder: Path, rounds: int = ROUNDS) -> tuple[set[str], int]:
    """Take the lock `rounds` times, and write who holds it. Returns the others that were met, and violations."""
    own, slip = f"{socket.gethostname()}:{os.getpid()}", folder / ".locks" / "lockcheck.holder"
    met, broken = set(), 0
    for turn in range(rounds):
        with taking_turns(folder, "lockcheck"):
            if turn:  # what stands there at first may be of an earlier check
                met.add(slip.read_text())
            slip.write_text(own)
            time.sleep(HOLD_S)
            broken += slip.read_text() != own
        time.sleep(APART_S)
    return met - {own}, broken


def main(argv: Sequence[str]) -> None:
    """One argument: the folder that is to be paths.cache."""
    if len(argv) != 1:
        raise UserError("allowed: one argument, the folder of paths.cache")
    met, broken = meet(Path(argv[0]))
    if broken:
        print(f"{socket.gethostname()}: NOT LOCKED: others wrote {broken} times while this process held the lock")
        sys.exit(1)
    if not met:
        raise UserError("no other process was met; run it on two nodes at once: srun -N 2 --ntasks-per-node=1 ...")
    print(f"{socket.gethostname()}: locks hold ({ROUNDS} rounds against {', '.join(sorted(met))})")


if __name__ == "__main__":
    command(main)()
