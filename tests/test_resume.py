"""Killed, interrupted and concurrent runs end in the row of an undisturbed one, and nothing finished is computed again.

As a script, it is the command line with a witness: `test_resume.py LOG POINT COUNT SIGNAL overrides...` writes to
LOG what is computed, and sends itself SIGNAL (0: none) in the middle of the COUNT-th piece of work at POINT.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ("debug=tiny", "metrics=none", "tracking=none", "sampler.batch_size=2")


def witness(log: Path, point: str, count: int, number: int) -> Callable[[str, str], None]:
    """seen(kind, name): note a piece of work that starts; in the middle of the one asked for, get the signal."""
    left = [count]

    def seen(kind: str, name: str) -> None:
        with log.open("a") as file:
            file.write(f"{kind} {name}\n")
        left[0] -= kind == point
        if number and kind == point and left[0] == 0:
            os.kill(os.getpid(), number)

    return seen


def watch(seen: Callable[[str, str], None], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let `seen` know of every shard that is written (by stage), and of every unit that is learned."""
    import dqbench.images  # noqa: F401 (what it writes beside shards is not watched, whenever it is imported)
    from dqbench import shards
    from dqbench.quant import reconstruct

    save, learn_rounding, learn_steps = shards.save_array, reconstruct.learn_rounding, reconstruct.learn_steps

    def save_array(path: Path, values: Any) -> None:
        path.with_suffix(".tmp").write_bytes(b"half of an array")
        seen(path.parents[1].name, f"{path.parent.stem}/{path.name}")
        save(path, values)

    def rounding(job: Any, name: str, *rest: Any) -> float:
        seen("weights", name)
        return learn_rounding(job, name, *rest)

    def steps(job: Any, name: str, *rest: Any) -> None:
        seen("activations", name)
        learn_steps(job, name, *rest)

    patch(shards, "save_array", save_array)
    patch(reconstruct, "learn_rounding", rounding)
    patch(reconstruct, "learn_steps", steps)


def start(log: Path, results: Path, *overrides: str, at: tuple[str, int, int] = ("", 0, 0)) -> subprocess.Popen[str]:
    """The witnessed command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(log), *map(str, at), *TINY, f"paths.results={results}", *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(log: Path, results: Path, *overrides: str) -> dict[str, Any]:
    """The witnessed run in this process -> numbers()."""
    from dqbench import run as pipeline
    from dqbench.config import compose
    from dqbench.launching.cells import run_folder

    cfg = compose([*TINY, f"paths.results={results}", *overrides])
    with pytest.MonkeyPatch.context() as patch:
        watch(witness(log, "", 0, 0), patch.setattr)
        pipeline.run(cfg, run_folder(cfg))
    return numbers(results)


def numbers(results: Path) -> dict[str, Any]:
    """A row below `results` without what may differ between two runs of a cell."""
    file = next(results.glob("runs/*/row.json"))
    content = json.loads(file.read_text())
    del content["timing"], content["provenance"]["time"]
    return content


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_in_the_same_row(tmp_path: Path) -> None:
    log, results = tmp_path / "log", tmp_path / "results"
    interruptions = [
        ("trajectory", 3, signal.SIGKILL),  # the second array of the second batch of chains
        ("weights", 4, signal.SIGKILL),
        ("activations", 3, signal.SIGINT),
        ("samples", 11, signal.SIGKILL),  # 8 shards at full precision, then quantized ones
    ]
    for point in interruptions:
        process = start(log, results, at=(point[0], point[1], int(point[2])))
        _, told = process.communicate()
        assert not list(results.rglob("row.json"))
        assert process.returncode == (130 if point[2] == signal.SIGINT else -signal.SIGKILL), told
        if point[2] == signal.SIGINT:
            assert [line for line in told.splitlines() if line.startswith("dqbench:") or "Traceback" in line] == [
                "dqbench: interrupted; the same command goes on from there"
            ]
    assert run(log, results) == run(tmp_path / "undisturbed.log", tmp_path / "undisturbed")

    once, again = (Counter(file.read_text().splitlines()) for file in (tmp_path / "undisturbed.log", log))
    assert set(once) == set(again) and set(once.values()) == {1}
    repeated = Counter(line.split()[0] for line, times in again.items() if times > 1)
    assert repeated == {"trajectory": repeated["trajectory"], "weights": 1, "activations": 1, "samples": 1}
    assert repeated["trajectory"] <= 3, "the arrays of one batch"
    assert not list(results.rglob("*.part")) and not list(results.rglob("*.tmp"))


def test_processes_at_work_on_the_same_things_take_turns(tmp_path: Path) -> None:
    from dqbench.config import compose
    from dqbench.identity import run_id
    from dqbench.stages import taking_turns

    log, results = tmp_path / "log", tmp_path / "results"
    cell = run_id(compose([*TINY, "method=rtn"]))
    with taking_turns(results / "cache", f"run-{cell}"):
        twins = [start(log, results, "method=rtn") for _ in range(2)]
        for twin in twins:
            assert f"waiting: another process works on run-{cell}" in twin.stderr.readline()
    run(log, results, "method=fp32")  # needs what the twins need
    told = [twin.communicate() for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0], told
    assert told[0][0] == told[1][0], "both print the row"
    assert sum("is done already" in err for _, err in told) == 1
    assert set(Counter(log.read_text().splitlines()).values()) == {1}


if __name__ == "__main__":
    path, kind, count, number = sys.argv[1:5]
    sys.argv[1:] = sys.argv[5:]
    from dqbench.__main__ import main

    watch(witness(Path(path), kind, int(count), int(number)))
    main()
