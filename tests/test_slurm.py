"""hydra/launcher=slurm: a sweep on a real Slurm of one node, through requeues, a kill and a cancellation.

The cluster is started for these tests (slurm_cluster.py), which skip where Slurm cannot be had.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import dqbench.__main__ as cli
from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.identity import run_id
from dqbench.launching import lockcheck, slurm_task, squeue
from dqbench.launching.cells import without_gpu
from dqbench.launching.slurm import set_aside
from dqbench.launching.slurm_options import LEAST, Options, minutes, parameters, read_options
from dqbench.launching.slurm_task import Task
from dqbench.stages import taking_turns
from tests.slurm_cluster import asked, one_node

ROOT = Path(__file__).resolve().parents[1]
TINY = ("debug=tiny", "metrics=none", "tracking=none")
SMALL = ("hydra/launcher=slurm", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1", "hydra.launcher.mem=null")
QUICK = (*SMALL, "hydra.launcher.poll_s=0.2")
AXES = ("method=rtn,ptq4dm", "seed=0,1,2")
PATIENCE_S = 300  # as long as it takes; nothing waits for it where all is well


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of the cluster."""
    with one_node(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def start(environment: dict[str, str], results: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command line of a sweep, in a process of its own."""
    command = [sys.executable, "-m", "dqbench", "-m", *TINY, f"paths.results={results}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """What ready() returns, once that is true."""
    end = time.monotonic() + PATIENCE_S
    while not (found := ready()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def keys(results: Path) -> dict[str, str]:
    """'method seed' -> name of the artifact of its quantized network."""
    found = {}
    for manifest in results.glob("cache/quantized/*/manifest.json"):
        depends = json.loads(manifest.read_text())["depends"]
        found[f"{depends['method']['name']} {depends['seed']}"] = manifest.parent.name
    return found


def numbers(results: Path) -> dict[str, Any]:
    """The rows below `results`, by run id, without what may differ between two runs of a cell."""
    rows = {}
    for file in results.glob("runs/*/row.json"):
        content = json.loads(file.read_text())
        del content["timing"], content["provenance"]["time"]
        rows[content["run_id"]] = content
    return rows


def cell_process(log: Path) -> psutil.Process:
    """The process of the cell that a task has logged as its command."""
    command = next(line for line in log.read_text().splitlines() if "$ " in line).partition("$ ")[2].split()
    return next(found for found in psutil.process_iter(["cmdline"]) if found.info["cmdline"] == command)


def warn(task: str, log: Path, environment: dict[str, str]) -> None:
    """As Slurm does before it preempts a job or ends it at its time limit."""
    asked("scancel", "--signal=USR2", task, environment=environment)


def requeue(task: str, log: Path, environment: dict[str, str]) -> None:
    """As an operator, or Slurm where a node fails."""
    asked("scontrol", "requeue", task, environment=environment)


def kill(task: str, log: Path, environment: dict[str, str]) -> None:
    """As the kernel where memory runs out."""
    cell_process(log).kill()


def cancel(task: str, log: Path, environment: dict[str, str]) -> None:
    """As a user who has thought better of it."""
    asked("scancel", task, environment=environment)


VICTIMS = {"rtn 0": warn, "rtn 1": kill, "rtn 2": cancel, "ptq4dm 0": requeue}  # in the order of the tasks


def disturb(environment: dict[str, str], results: Path, names: dict[str, str]) -> None:
    """Each victim waits for its quantized network, whose lock is held here, and is struck there."""
    locks = {cell: taking_turns(results / "cache", f"quantized-{names[cell]}") for cell in VICTIMS}
    for lock in locks.values():
        lock.__enter__()
    for index, (cell, strike) in enumerate(VICTIMS.items()):
        line = f"waiting: another process works on quantized-{names[cell]}"

        def log(index: int = index, line: str = line) -> Path | None:
            return next((log for log in results.glob(f".slurm/*/*_{index}_0_log.out") if line in log.read_text()), None)

        path = wait_for(log, f"{cell} to come to the lock")
        task = path.name.removesuffix("_0_log.out")
        process = cell_process(path)
        strike(task, path, environment)
        wait_for(lambda process=process: not process.is_running(), f"the end of {cell}")
        locks[cell].__exit__(None, None, None)


@pytest.mark.slow
def test_sweep_survives_requeues_a_kill_and_a_cancellation(slurm: dict[str, str], tmp_path: Path) -> None:
    plain, results = tmp_path / "plain", tmp_path / "results"
    assert start(slurm, plain, *AXES).wait() == 0
    sweep = start(slurm, results, *AXES, *QUICK)
    disturb(slurm, results, keys(plain))
    out, err = sweep.communicate(timeout=PATIENCE_S)
    assert sweep.returncode == 1 and "4 of 6 rows" in out, err
    failed = [line for line in err.splitlines() if " failed: " in line]
    assert len(failed) == 2 and all(f"log: {results}/.slurm/" in line for line in failed), err
    assert "(method=rtn seed=1)" in failed[0] and "ended as FAILED" in failed[0]
    assert "(method=rtn seed=2)" in failed[1] and "ended as CANCELLED" in failed[1]
    again = [line for line in err.splitlines() if "waits again" in line]
    assert sorted(line.split(": ")[-1] for line in again) == ["method=ptq4dm seed=0", "method=rtn seed=0"], err
    assert "Traceback" not in err and "sacct" not in err

    rest = start(slurm, results, *AXES, *QUICK)
    out, err = rest.communicate(timeout=PATIENCE_S)
    assert rest.returncode == 0 and "6 of 6 rows" in out and "submitted 2 of 2 as Slurm job" in err, err
    assert len(numbers(plain)) == 6 and numbers(results) == numbers(plain)
    logs = [log.read_text() for log in results.glob(".slurm/*/*_0_log.out")]
    assert sum(text.count("fp32 trajectory          4 of 4") for text in logs) == 3, "once a seed: the others resumed"
    left = {path.suffix for path in results.glob(".slurm/*/*")}
    assert left == {".out", ".sh"} and not list(results.rglob("*.part"))


@pytest.mark.slow
def test_interrupted_launch_cancels_its_tasks_or_leaves_them_to_the_next(slurm: dict[str, str], tmp_path: Path) -> None:
    one = ("method=rtn", f"paths.results={tmp_path}")
    name = run_id(compose([*TINY, *one]))

    def interrupted(*overrides: str) -> str:
        launch = start(slurm, tmp_path, *one, *QUICK, *overrides)
        wait_for((tmp_path / ".slurm" / f"{name}.job").is_file, "the submission")
        wait_for(lambda: "RUNNING" in asked("squeue", "-h", "-o", "%T", environment=slurm), "the task")
        launch.send_signal(signal.SIGINT)
        out, err = launch.communicate(timeout=PATIENCE_S)
        assert launch.returncode == 130 and out == "" and "Traceback" not in err, err
        return err

    with taking_turns(tmp_path / "cache", f"run-{name}"):
        assert "cancelled: " in interrupted()
        wait_for(lambda: not asked("squeue", "-h", environment=slurm), "an empty queue")
        assert not list((tmp_path / ".slurm").glob("*.job"))
        told = interrupted("hydra.launcher.on_interrupt=detach")
        assert "left to go on in Slurm: " in told and "the same command joins them" in told
        (task,) = asked("squeue", "-h", "-o", "%i", environment=slurm).split()
        joining = start(slurm, tmp_path, *one, *QUICK)
        assert joining.stderr.readline().endswith(f"joining what is in Slurm's queue already: {task}\n")
    out, err = joining.communicate(timeout=PATIENCE_S)
    assert joining.returncode == 0 and "row.json" in out and f"(Slurm {task})" in err, err
    assert len(list((tmp_path / ".slurm").glob("*/*_submission.sh"))) == 2


def test_what_sbatch_refuses_is_one_line(slurm: dict[str, str], tmp_path: Path) -> None:
    refused = start(slurm, tmp_path, "method=rtn,fp32", *QUICK, "hydra.launcher.partition=nowhere")
    out, err = refused.communicate(timeout=PATIENCE_S)
    (line,) = err.splitlines()
    assert refused.returncode == 2 and out == "" and line.startswith("dqbench: Slurm refused the job: ")
    assert "invalid partition specified: nowhere" in line and not list(tmp_path.glob(".slurm/*"))


def test_rows_that_are_to_be_made_anew_come_back_where_nothing_was_started(tmp_path: Path) -> None:
    files = [tmp_path / name / "row.json" for name in "ab"]
    for file in files:
        file.parent.mkdir()
    files[0].write_text("earlier")
    with pytest.raises(UserError, match="refused"), set_aside(files):
        assert not files[0].exists()
        raise UserError("Slurm refused the job")
    assert files[0].read_text() == "earlier" and not files[1].exists()
    with set_aside(files):
        files[0].write_text("of a quick task")
    assert [path.name for path in files[0].parent.iterdir()] == ["row.json"] and files[0].read_text() != "earlier"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """here(*overrides): the one line of a sweep that is refused in this process; nothing may be written."""

    def call(*overrides: str) -> str:
        results = tmp_path / "results"
        monkeypatch.setattr(sys, "argv", ["dqbench", "-m", *TINY, f"paths.results={results}", *overrides])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert end.value.code == 2 and shown.out == "" and not results.exists()
        return line

    return call


def test_machine_without_slurm_is_told_what_else_there_is(here, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = here("hydra/launcher=slurm")
    assert line.startswith("dqbench: hydra/launcher=slurm: sbatch, squeue, scancel, srun not found on this machine; ")
    assert line.endswith("choose hydra/launcher=basic or accelerate")


BAD = {
    "time=soon": "hydra.launcher.time=soon is no time; allowed: minutes, h:m:s, d-h or d-h:m:s, more than 0",
    "gpus=two": "hydra.launcher.gpus=two has the wrong type; allowed: an integer",
    "cpus=0": "hydra.launcher.cpus=0 is out of range; allowed: 1 or more",
    "partitoin=main": "hydra.launcher.partitoin is unknown; did you mean partition? allowed in hydra.launcher: ",
    "on_interrupt=ask": "hydra.launcher.on_interrupt=ask is unknown; allowed: cancel, detach",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_option_is_one_line(override: str, here: Callable[..., str]) -> None:
    assert BAD[override] in here("hydra/launcher=slurm", f"hydra.launcher.{override}")


@pytest.mark.parametrize(
    ("time", "expected"),
    {"90": 90, "1:30": 2, "4:00:00": 240, "2-0": 2880, "1-12:30": 2190, "1-00:00:01": 1441}.items(),
)
def test_times_are_slurms(time: str, expected: int) -> None:
    assert minutes(time) == expected


def options(**changed: Any) -> Options:
    """The shipped options, some of them changed."""
    overrides = ["hydra/launcher=slurm"]
    import hydra

    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = hydra.compose("config", overrides, return_hydra_config=True).hydra.launcher
    return read_options({key: value for key, value in {**node, **changed}.items() if key != "_target_"})


def test_options_become_sbatch_flags(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    given = options(gpus=2, partition="a100", qos="low", setup=["module load cuda"], sbatch={"mail-type": "FAIL"})
    text = _make_sbatch_string(command="run", folder=tmp_path, **parameters(given))
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    expected = {"gres=gpu:2", "partition=a100", "qos=low", "mail-type=FAIL", "mem=32G", "time=240", "requeue"}
    assert expected <= flags and "cpus-per-task=8" in flags and "signal=USR2@120" in flags
    assert "\nmodule load cuda\n" in text and "--cpus-per-task=8 run" in text
    assert not [flag for flag in flags if flag.startswith(("account", "constraint", "wckey"))]
    assert "gres=gpu:a100:1" in _make_sbatch_string(
        command="run", folder=tmp_path, **parameters(options(sbatch={"gres": "gpu:a100:1"}))
    )
    assert set(LEAST) <= set(Options.__annotations__)


def test_queue_that_does_not_answer_ends_no_job(monkeypatch, tmp_path, caplog):
    script = tmp_path / "squeue"
    script.write_text("#!/bin/sh\necho slurm_load_jobs error: cannot contact controller >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert squeue.look() is None and "cannot contact controller" in caplog.text
    script.write_text("#!/bin/sh\necho '7_0|RUNNING|n1|None'; echo '7_1|PENDING||Priority'; echo '7_2|FAILED||Out'\n")
    queue = squeue.look()
    assert queue["7_1"] == ("PENDING", "Priority") and queue["7_0"] == ("RUNNING", "n1")
    assert [squeue.is_alive(queue[job][0]) for job in ("7_0", "7_1", "7_2")] == [True, True, False]
    assert not squeue.is_alive(None)


def test_cell_for_gpus_is_checked_on_a_machine_without() -> None:
    cfg = compose([*TINY, "runtime.device=cuda"])
    assert without_gpu(cfg).runtime.device == "auto" and cfg.runtime.device == "cuda"
    assert without_gpu(compose([*TINY, "runtime.device=gpu"])).runtime.device == "gpu"


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "sweeps" / "cluster").glob("*.yaml")))
def test_cluster_presets_combine_with_a_sweep_and_rename_nothing(preset: str) -> None:
    cluster, sweep = f"+sweeps/cluster={preset}", "+sweeps=digits"
    for overrides in ([sweep, cluster], [cluster, sweep]):
        assert run_id(compose([*overrides, "method=rtn"])) == run_id(compose([sweep, "method=rtn"]))
    command = [sys.executable, "-m", "dqbench", cluster, sweep, "--cfg", "hydra"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "mode: MULTIRUN" in told and "bits: w8a8,w4a8,w4a4" in told
    assert f"_target_: hydra_plugins.dqbench_{'slurm' if preset == 'array' else 'accelerate'}" in told


def test_locks_are_seen_to_hold_and_seen_to_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "dqbench.launching.lockcheck", str(tmp_path)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    told = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0] and all("locks hold (200 rounds" in line for line in told)

    @contextmanager
    def broken(folder: Path, name: str) -> Iterator[None]:
        yield monkeypatch.setattr(lockcheck.time, "sleep", lambda _: slip.write_text("elsewhere:1"))

    slip = tmp_path / ".locks" / "lockcheck.holder"
    monkeypatch.setattr(lockcheck, "taking_turns", broken)
    met, violations = lockcheck.meet(tmp_path, rounds=3)
    assert "elsewhere:1" in met and violations == 3


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Task]]:
    """task(code): one whose cell is a piece of Python."""
    before = signal.getsignal(signal.SIGTERM)

    def make(code: str) -> Task:
        monkeypatch.setattr(slurm_task, "cell_command", lambda *_: [sys.executable, "-c", code])
        return Task(["seed=1"], 1, str(ROOT))

    yield make
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("code", "status"), {"raise SystemExit(2)": 2, "import os; os.kill(os.getpid(), 9)": 137}.items()
)
def test_task_ends_as_its_cell(code: str, status: int, task: Callable[[str], Task]) -> None:
    with pytest.raises(SystemExit) as end:
        task(code)()
    assert end.value.code == status


def test_cell_ignores_the_warning_and_ends_with_the_checkpoint(task: Callable[[str], Task]) -> None:
    stopped = []

    def warned(number: int, frame: object) -> None:
        os.kill(job.process.pid, slurm_task.WARNING)
        stopped.append(pickle.loads(pickle.dumps(job.checkpoint())).function)

    job = task("import os, signal; os.kill(os.getppid(), signal.SIGALRM); signal.pause()")
    before = signal.signal(signal.SIGALRM, warned)
    with pytest.raises(SystemExit) as end:
        job()
    signal.signal(signal.SIGALRM, before)
    assert end.value.code == 128 + signal.SIGTERM and stopped == [Task(["seed=1"], 1, str(ROOT))]
