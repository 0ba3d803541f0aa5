"""hydra/launcher=accelerate: cells side by side end in the rows of cells one by one; nothing outlives the launcher."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import psutil
import pytest
from accelerate.commands.launch import launch_command_parser

import dqbench.__main__ as cli
from dqbench.config import compose, data_root, register
from dqbench.errors import UserError
from dqbench.identity import run_id
from dqbench.launching import children, command, side_by_side
from dqbench.launching.board import board, standing
from dqbench.launching.cells import run_folder
from dqbench.launching.children import Child
from dqbench.launching.command import Job, cell_command, cell_overrides
from dqbench.launching.lifeline import LAUNCHER
from dqbench.launching.pool import Options, Slot, environment, find_slots, read_options, slots, visible
from dqbench.models import ZOO
from dqbench.progress import STATUS, track

ROOT = Path(__file__).resolve().parents[1]
TINY = ("debug=tiny", "metrics=none", "tracking=none")
CPU = Slot((), 1)


def options(**changes: Any) -> Options:
    return Options(**{"max_parallel": None, "gpus_per_cell": None, "processes_per_cell": None, "grace": 1.0} | changes)


# ---- the pool


def test_gpus_are_handed_out_in_disjoint_groups() -> None:
    gpus = visible("4,5,GPU-8a,7", 4)
    assert [slot.devices for slot in slots(options(), gpus, 8)] == [("4",), ("5",), ("GPU-8a",), ("7",)]
    pairs = slots(options(gpus_per_cell=2), gpus, 8)
    assert pairs == [Slot(("4", "5"), 2), Slot(("GPU-8a", "7"), 2)]
    assert slots(options(gpus_per_cell=3), gpus, 8) == [Slot(("4", "5", "GPU-8a"), 3)], "the fourth would not do"
    assert slots(options(max_parallel=2), gpus, 8) == slots(options(), gpus, 8)[:2]
    assert visible(None, 3) == ["0", "1", "2"] and visible("", 0) == [] and visible("3,-1,2", 1) == ["3"]


def test_cores_are_shared_where_there_is_no_gpu() -> None:
    assert slots(options(), [], 6) == [CPU] * 6
    assert slots(options(), [], 6, threads=4) == [CPU] and slots(options(), [], 6, threads=8) == [CPU]
    assert slots(options(processes_per_cell=2), [], 6) == [Slot((), 2)] * 3
    assert slots(options(max_parallel=9), [], 6) == [CPU] * 9, "who asks for more gets it"


def test_environment_splits_the_cores_and_names_the_devices() -> None:
    pair = Slot(("2", "5"), 2)
    assert environment(pair, 2, {"A": "1"}, 16) == {"A": "1", "CUDA_VISIBLE_DEVICES": "2,5", "OMP_NUM_THREADS": "4"}
    assert environment(CPU, 9, {"CUDA_VISIBLE_DEVICES": ""}, 6) == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert environment(CPU, 2, {"OMP_NUM_THREADS": "3"}, 16)["OMP_NUM_THREADS"] == "3"
    assert environment(CPU, 2, {"OMP_NUM_THREADS": "16"}, 16)["OMP_NUM_THREADS"] == "8"


GIVEN = {"max_parallel": None, "gpus_per_cell": None, "processes_per_cell": None, "grace": 10}
BAD = [
    ({"max_parallel": 0}, "hydra.launcher.max_parallel=0 is out of range; allowed: 1 or more"),
    ({"max_parallel": "x"}, "hydra.launcher.max_parallel=x has the wrong type; allowed: an integer"),
    ({"grace": float("nan")}, "hydra.launcher.grace=nan is out of range; allowed: 0 or more"),
    ({"gpus_per_cell": 1}, "hydra.launcher.gpus_per_cell=1: there is no GPU to hand out; leave it at null "),
]


@pytest.mark.parametrize(("given", "complaint"), BAD)
def test_bad_options_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        find_slots(read_options(GIVEN | given), compose(["runtime.device=cpu"]).runtime)
    assert str(error.value).startswith(complaint)


def test_more_gpus_than_there_are_and_a_device_of_its_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"gpus_per_cell=3: 2 to hand out \(0, 1\)"):
        slots(options(gpus_per_cell=3), ["0", "1"], 8)
    with pytest.raises(UserError, match="processes_per_cell=1 is not gpus_per_cell=2"):
        slots(options(gpus_per_cell=2, processes_per_cell=1), ["0", "1"], 8)
    with pytest.raises(UserError, match="runtime.device=cuda:1: .* hands out the GPUs itself; allowed: auto, "):
        find_slots(options(), compose(["runtime.device=cuda:1"]).runtime)


def test_bad_input_ends_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    sweep = ["-m", *TINY, "method=fp32,rtn", f"paths.results={results}", "hydra/launcher=accelerate"]
    monkeypatch.setattr(sys, "argv", ["dqbench", *sweep, "hydra.launcher.max_parallel=0"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not results.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "dqbench: hydra.launcher.max_parallel=0 is out of range; allowed: 1 or more"


# ---- the command of a cell


def test_accelerate_takes_the_command_and_starts_as_many_processes(tmp_path: Path) -> None:
    assert cell_command(["bits=w4a4"]) == [sys.executable, "-m", "dqbench", "bits=w4a4", "hydra.mode=RUN"]
    command = cell_command(["bits=w4a4"], 3)
    parsed = launch_command_parser().parse_args(command[3:])
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and parsed.num_processes == 3 and parsed.module
    assert parsed.training_script == "dqbench" and parsed.training_script_args == ["bits=w4a4", "hydra.mode=RUN"]
    every = {**os.environ, "DQBENCH_DEBUG": "1"}  # else the main process alone speaks
    told = subprocess.run(cell_command(["--help"], 2), cwd=ROOT, env=every, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("Groups (* is the default)") == 2, told.stderr


def sweep_config(*overrides: str) -> Any:
    """The config of a sweep with Hydra's own part, as a launcher gets it."""
    register()
    with hydra.initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        return hydra.compose("config", ["hydra/launcher=accelerate", *overrides], return_hydra_config=True)


def test_a_cell_keeps_the_sweeps_overrides_and_its_name_as_group() -> None:
    sweep = sweep_config("+sweeps=digits", "hydra.verbose=false", "hydra.mode=MULTIRUN")
    own = ["method=rtn", "+sweeps=digits"]
    given = cell_overrides(sweep, own, compose(own))
    assert given == ["hydra/launcher=accelerate", "hydra.verbose=false", *own, "tracking.group=digits"]
    assert run_id(compose(given[2:])) == run_id(compose(own))
    for chosen in ("tracking.group=mine", "tracking=none"):
        assert cell_overrides(sweep, [*own, chosen], compose([*own, chosen]))[-1] == chosen
    plain = cell_overrides(sweep_config("hydra.mode=MULTIRUN"), ["method=rtn"], compose(["method=rtn"]))
    assert plain[-1] == "tracking.group=digits_ddpm"


def test_a_cell_reads_the_configs_of_its_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqbench", "-m", "--config-dir", "mine", "-cn", "other", "method=mine"])
    given = cell_overrides(sweep_config("hydra.mode=MULTIRUN"), ["method=rtn"], compose(["method=rtn"]))
    assert given[:2] == [f"--config-dir={tmp_path / 'mine'}", "--config-name=other"]
    cli.read_flags(["dqbench", *given])


def test_a_cell_named_twice_is_one_job_and_sharers_start_late() -> None:
    own = [[f"seed={seed}", f"method={method}", "debug=tiny"] for seed in (0, 1) for method in ("fp32", "rtn", "fp32")]
    jobs = command.jobs_of(sweep_config("hydra.mode=MULTIRUN"), own, [compose(given) for given in own])
    assert [job.label for job in jobs] == [f"seed={seed} method={m}" for seed in (0, 1) for m in ("fp32", "rtn")]
    first = [job.label for job in side_by_side.spread(jobs)]
    assert first == [f"seed={seed} method={method}" for method in ("fp32", "rtn") for seed in (0, 1)]


# ---- processes, with programs of a few lines in place of cells


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """run({name: program}, *slots) runs programs as cells would be, in tmp_path -> the results folder."""
    monkeypatch.setattr(children, "cell_command", lambda overrides, count: [sys.executable, "-c", *overrides])
    monkeypatch.chdir(tmp_path)
    logging.getLogger("dqbench").setLevel(logging.INFO)

    def call(programs: dict[str, str], *places: Slot, grace: float = 1.0) -> Path:
        jobs = [job(name, tmp_path, program) for name, program in programs.items()]
        with board(len(jobs)) as shown:
            side_by_side.SideBySide(jobs, list(places), shown, tmp_path, grace).run()
        return tmp_path

    return call


def job(name: str, results: Path, program: str = "") -> Job:
    cfg = compose([f"paths.results={results / name}", "debug=tiny"])
    return Job(name, cfg, ["import os, signal, sys, subprocess, time\n" + program], f"label of {name}")


def test_no_two_cells_share_a_device(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    alone = (
        "mine = os.environ['CUDA_VISIBLE_DEVICES']; os.close(os.open(mine, os.O_CREAT | os.O_EXCL))\n"
        "open('used', 'a').write(mine + ' '); os.remove(mine)"
    )
    folder = run({f"cell{i}": alone for i in range(6)}, Slot(("0",), 1), Slot(("GPU-7", "3"), 2))
    assert "6 of 6 done, 0 to go" in caplog.messages[-1] and len((folder / "used").read_text().split()) == 6
    assert set((folder / "used").read_text().split()) == {"0", "GPU-7,3"}


def test_a_failed_cell_is_told_when_it_fails_with_its_own_reason(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    said = "dqbench: run bad failed: RuntimeError: why (its overrides)"
    programs = {
        "bad": f"print('dqbench: a word'); print({said!r}); print('dqbench: more'); sys.exit(1)",
        "good": "print('fine')",
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "silent": "print('dqbench: warning: of something else'); sys.exit(3)",
        "input": "print('dqbench: no such thing'); sys.exit(2)",
    }
    folder = run(programs, CPU)
    told = [line for line in caplog.messages if " starts" not in line]
    log = {name: job(name, folder).log for name in programs}
    assert told[0] == (
        f"run bad failed: RuntimeError: why (its overrides) (label of bad); log: {log['bad']}; "
        "0 of 5 done, 1 failed, 4 to go"
    )
    assert told[1].startswith("good is done in ") and log["good"].read_text() == "fine\n"
    assert told[2].startswith("run killed failed: killed by SIGKILL, as the system does where memory runs out (label")
    assert told[3].startswith("run silent failed: exit status 3 (")
    assert told[4].startswith("run input failed: no such thing (")
    assert told[4].endswith("; 1 of 5 done, 4 failed, 0 to go")
    assert caplog.messages.index(told[0]) < caplog.messages.index("good starts: label of good")
    assert [record.levelname for record in caplog.records if " failed: " in record.message] == ["ERROR"] * 4


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cells_and_what_they_started_in_other_sessions(
    run: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn = (
        f"{deaf}code = 'import signal; {deaf.strip()}; print(flush=True); signal.pause()'\n"
        "below = subprocess.Popen([sys.executable, '-c', code], start_new_session=True, stdout=subprocess.PIPE)\n"
        "below.stdout.readline(); open('pids', 'w').write(f'{os.getpid()} {below.pid}')\n"
        f"os.kill(os.getppid(), {int(number)}); signal.pause()"
    )
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run({"one": stubborn, "two": "open('two', 'w')"}, CPU, grace=0.2)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert not (tmp_path / "two").exists() and signal.getsignal(number) == before


def test_what_another_sweep_finished_meanwhile_is_not_started(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(side_by_side, "is_finished", lambda cfg, anew=False: "there" in cfg.paths.results)
    run({"there": "sys.exit(1)", "new": ""}, CPU)
    assert [line.split()[:2] for line in caplog.messages] == [["there", "is"], ["new", "starts:"], ["new", "is"]]


def test_what_another_sweep_is_at_work_on_waits_until_that_one_lets_go(
    run: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another launcher holds the first cell, and dies when the second one says so."""
    code = (
        "import os, sys; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    lock = side_by_side.claim(first := job("first", tmp_path))
    lock.release()
    other = subprocess.Popen(
        [sys.executable, "-c", code, lock.lock_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n" and side_by_side.claim(first) is None
    run({"first": "", "second": f"os.kill({other.pid}, signal.SIGKILL)"}, CPU)
    other.wait()
    assert [line.split()[0] for line in caplog.messages] == ["second", "second", "first", "first"]


def test_force_removes_the_old_row_before_the_cell_starts(run: Callable[..., Path], tmp_path: Path) -> None:
    row = run_folder(job("one", tmp_path).cfg) / "row.json"
    row.parent.mkdir(parents=True)
    row.touch()
    run({"one": f"sys.exit(not os.path.exists({str(row)!r}))"}, CPU)
    assert row.exists(), "without runtime.force it is the cell's own"
    forced = job("one", tmp_path)
    forced.cfg.runtime.force = True
    with board(1) as shown:
        side_by_side.SideBySide([forced], [CPU], shown, tmp_path, 1.0).run()
    assert not row.exists()


CELL = "from dqbench.launching.lifeline import end_with_launcher as e; e(); print('up', flush=True); input()"


def test_a_cell_ends_with_its_launcher() -> None:
    """The launcher is not the cell's parent, as in a group that accelerate starts."""
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    cell = subprocess.Popen(
        [sys.executable, "-c", CELL],
        cwd=ROOT,
        env={**os.environ, LAUNCHER: str(launcher.pid)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert cell.stdout.readline() == b"up\n"
    launcher.kill()
    assert cell.wait(timeout=60) == 1
    launcher.wait()


def test_a_cell_ends_with_the_process_that_started_it() -> None:
    """That one is killed; the pipe that the cell holds then closes."""
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {CELL!r}], stdin=0); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, LAUNCHER: str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout.readline() == b"up\n"
    parent.kill()
    with parent.stdin:  # held open: the cell waits for input
        assert parent.stdout.read() == b""
    parent.wait()


# ---- what a person sees


def test_a_cell_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(job("one", tmp_path), CPU, SimpleNamespace(), tmp_path / "one.json", 0, 0.0)
    assert child.status == {} and standing(child) == "one: starts"
    monkeypatch.setenv(STATUS, str(child.status_file))
    items = track(range(8), "quantized samples", 10, done=2)
    next(items)
    assert child.status == {"stage": "quantized samples", "done": 2, "total": 10}
    assert standing(child) == "one: quantized samples 20 %"
    monkeypatch.setenv("RANK", "1")
    assert [*items] == list(range(1, 8)) and child.status["done"] == 2, "one process of a group speaks for it"
    monkeypatch.setenv("RANK", "0")
    assert len([*track([range(4)], "quantized samples", 10, done=6)]) == 1 and child.status["done"] == 10


# ---- the command line


def rows(results: Path) -> dict[str, Any]:
    """Rows by run id, without what may differ between two runs of a cell."""
    content = {file.parent.name: json.loads(file.read_text()) for file in results.glob("runs/*/row.json")}
    for row in content.values():
        del row["timing"], row["provenance"]["time"]
    return content


def poisoned(folder: Path) -> Path:
    """A copy of the digits pipeline whose samples are NaN: a cell that fails when it runs, not before."""
    from safetensors.torch import load_file, save_file

    weights = "unet/diffusion_pytorch_model.safetensors"
    shutil.copytree(ZOO / "digits_ddpm", folder)
    tensors = load_file(folder / weights)
    tensors["conv_out.bias"] += float("nan")
    save_file(tensors, folder / weights)
    return folder


def started(results: Path, process: subprocess.Popen[str]) -> bool:
    logs = [log.read_text() for log in results.glob("runs/*/process.log")]
    return any(" starts: " in text for text in logs) or process.poll() is not None


@pytest.mark.slow
def test_interrupted_sweep_goes_on_and_ends_in_the_rows_of_single_runs(tmp_path: Path) -> None:
    import dqbench

    results, bad = tmp_path / "results", poisoned(tmp_path / "poisoned")
    sweep = ["-m", *TINY, f"model.path={bad},zoo:digits_ddpm", "method=fp32", f"paths.results={results}"]
    command = [sys.executable, "-m", "dqbench", *sweep, "hydra/launcher=accelerate", "hydra.launcher.max_parallel=2"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not started(results, first):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate()
    assert first.returncode == 130, told
    assert told.splitlines()[-1] == "dqbench: interrupted; the same command goes on from there"
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if f"paths.results={results}" in line]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "1 of 2 rows" in again.stdout, again.stderr
    (line,) = [line for line in again.stderr.splitlines() if "failed: DegenerateSamples: " in line]
    (log,) = [file for file in results.glob("runs/*/process.log") if not (file.parent / "row.json").exists()]
    assert f"(model.path={bad}); log: {log}; " in line and "Traceback" not in again.stderr
    dqbench.run([*TINY, "method=fp32", f"paths.results={tmp_path / 'single'}"])
    assert rows(results) == rows(tmp_path / "single")
