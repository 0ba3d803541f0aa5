"""Kill a sweep at random moments, start it again, and compare its rows with those of an undisturbed one.

python tests/faults.py [kills=30] [seed=0] [twice=0.3] [override ...]       the overrides replace those of the sweep

Every moment at which a process of the sweep is about to change a file below its results is counted (opened for
writing, renamed, deleted, made): a kill is SIGKILL at one of them, drawn at random, sent to whichever process does it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ("debug=tiny", "metrics=none", "tracking=none", "method=rtn,qdiffusion", "bits=w4a8,w4a4")
HOOK = """
import os, signal, sys
log, root, moment = (os.environ[f"FAULTS_{name}"] for name in ("LOG", "ROOT", "MOMENT"))
root += os.sep
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def hook(event, args):
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime"):
        return
    path = args[0] if isinstance(args[0], (str, bytes, os.PathLike)) else ""
    path = os.path.abspath(os.fsdecode(path))
    if not path.startswith(root) or event == "open" and not (args[2] or 0) & writing:
        return
    os.write(target, b".")
    if os.fstat(target).st_size == int(moment):
        with open(log + ".place", "w") as place:
            place.write(f"{event} {os.path.relpath(path, root)}")
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
"""
CLOCK = """
import itertools, time
start, ticks = time.time(), itertools.count()
time.time = lambda: start - 3600 * next(ticks)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@dataclass(frozen=True)
class Bench:
    """A folder for trials, and the sweep that they run."""

    folder: Path
    sweep: Sequence[str] = SWEEP

    def start(self, name: str, moment: int = 0, more: Sequence[str] = (), patch: str = HOOK) -> subprocess.Popen[str]:
        """The sweep into the results `name`; killed at the moment of this number, 0: never."""
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(patch)
        names = {"LOG": str(self.log(name)), "ROOT": str(self.results(name)), "MOMENT": str(moment)}
        environment = {**os.environ, **{f"FAULTS_{key}": value for key, value in names.items()}}
        environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
        command = [sys.executable, "-m", "dqbench", "-m", *self.sweep, f"paths.results={self.results(name)}", *more]
        self.log(name).unlink(missing_ok=True)
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )

    def run(self, name: str, moment: int = 0, **options: Any) -> tuple[int, str]:
        """Exit status and output of the sweep."""
        process = self.start(name, moment, **options)
        told, _ = process.communicate()
        return process.returncode, told

    def results(self, name: str) -> Path:
        """Where a trial's rows are."""
        return self.folder / name

    def log(self, name: str) -> Path:
        """A byte for each moment of a trial's last run."""
        return self.folder / f"{name}.log"

    def moments(self, name: str) -> int:
        """How many there were."""
        return self.log(name).stat().st_size

    def place(self, name: str) -> str:
        """What was about to be changed when the last run was killed."""
        return Path(f"{self.log(name)}.place").read_text()


def numbers(results: Path) -> dict[str, Any]:
    """The rows below `results` without what may differ between two runs of a cell."""
    rows = [json.loads(file.read_text()) for file in sorted(results.glob("runs/*/row.json"))]
    for row in rows:
        del row["timing"], row["provenance"]["time"]
    return {row["run_id"]: row for row in rows}


def litter(results: Path) -> list[str]:
    """What a killed run left and a whole one should have taken away."""
    return sorted(str(path.relative_to(results)) for end in ("*.tmp", "*.part") for path in results.rglob(end))


def trial(bench: Bench, name: str, moments: Sequence[int], expected: dict[str, Any]) -> list[str]:
    """Kill a sweep at each of these moments in turn, then let it end; where it was hit. Raises AssertionError."""
    places = []
    for moment in moments:
        status, told = bench.run(name, moment)
        if status == 0:  # what was left took fewer moments than that
            break
        assert status == -signal.SIGKILL, told
        places.append(bench.place(name))
    status, told = bench.run(name)
    assert status == 0, told
    assert numbers(bench.results(name)) == expected, f"other rows after {places}"
    assert not litter(bench.results(name)), litter(bench.results(name))
    return places


def main(argv: Sequence[str]) -> None:
    """Print a line per trial; status 1 where one ended in other rows."""
    known = {"kills": 30.0, "seed": 0.0, "twice": 0.3}
    for part in [part for part in argv if part.split("=")[0] in known]:
        known[part.split("=")[0]] = float(part.split("=")[1])
    overrides = [part for part in argv if part.split("=")[0] not in known]
    draw, failed = random.Random(int(known["seed"])), 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), overrides or SWEEP)
        status, told = bench.run("undisturbed")
        assert status == 0, told
        expected, count = numbers(bench.results("undisturbed")), bench.moments("undisturbed")
        print(f"{len(expected)} rows, {count} moments", flush=True)
        for number in range(int(known["kills"])):
            moments = [draw.randint(1, count) for _ in range(1 + (draw.random() < known["twice"]))]
            try:
                print(
                    f"{number}: {moments}: {', '.join(trial(bench, f'trial{number}', moments, expected))}: equal rows"
                )
            except AssertionError as error:
                failed += 1
                print(f"{number}: {moments}: FAILED: {error}")
            sys.stdout.flush()
    print(f"{failed} of {int(known['kills'])} trials failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
