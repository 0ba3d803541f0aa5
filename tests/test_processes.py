"""Several processes on one cell: the artifacts of one process, one voice, one end.

As a script, under accelerate: `test_processes.py overrides...` runs a text cell from Python, then the command line with
these overrides, in which the second process fails at its third unit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dqbench
from dqbench import processes
from dqbench.__main__ import follow, read_flags
from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.launching.preflight import choose_device
from dqbench.run import Cell

ROOT = Path(__file__).resolve().parents[1]
# A mini-batch of 3 rows is cut unevenly; 4 chains in batches of 8 leave a process without work.
CELL = ["debug=tiny", "metrics=none", "tracking=none", "recon.batch_size=3"]
TEXT = ["model=text_mdlm", "method=rtn", "bits=w4a32", "debug=tiny", "tracking=none", "sampler.num_samples=8"]
TEXT += ["sampler.batch_size=4", "metrics.likelihood.count=4", "metrics.likelihood.draws=2", "metrics.bootstrap=2"]
TEXT += ["metrics.batch_size=4"]  # of everything there are two batches or more


def launch(*program: str) -> subprocess.CompletedProcess[str]:
    """A program under `accelerate launch` in two processes on CPUs."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0", *program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def quantize(results: Path) -> Path:
    """The folder of CELL's network, made in this process."""
    cell = Cell(compose([*CELL, f"paths.results={results}"]))
    return cell.quantize(cell.calibrate()).base.folder


def artifacts(results: Path) -> dict[str, Path]:
    """The files of all stages by name; a manifest also tells of times, and predictions are what one process shares."""
    left_out = {".locks", "predictions"}
    files = (path for path in (results / "cache").rglob("*") if path.is_file() and not left_out & {*path.parts})
    return {str(path.relative_to(results)): path for path in files if path.name != "manifest.json"}


def assert_equal(one: Path, two: Path) -> None:
    """Arrays bit by bit; what is learned within 1e-5."""
    mine, theirs = artifacts(one), artifacts(two)
    assert mine.keys() == theirs.keys() and any("samples" in name for name in mine)
    for name, file in mine.items():
        if name.endswith(".npy"):
            np.testing.assert_array_equal(np.load(file), np.load(theirs[name]), err_msg=name)
        elif name.endswith(".safetensors"):
            torch.testing.assert_close(load_file(theirs[name]), load_file(file), rtol=0, atol=1e-5)


def row(results: Path) -> dict[str, Any]:
    """The row below `results`."""
    return json.loads(next(results.glob("runs/*/row.json")).read_text())


@pytest.mark.slow
def test_two_processes_make_the_row_of_one_and_one_of_them_speaks(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch("-m", "dqbench", *CELL, f"paths.results={two}")
    assert done.returncode == 0, done.stderr
    mine, theirs = quantize(one), next(two.glob("cache/quantized/*"))
    learned = [load_file(folder / "denoiser.safetensors") for folder in (mine, theirs)]
    torch.testing.assert_close(*learned, rtol=0, atol=1e-5)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)  # from here on the same network: a scale's last bit can change a pixel
    dqbench.run([*CELL, f"paths.results={one}"])
    assert_equal(one, two)
    mine, theirs = row(one), row(two)
    for part in ("run_id", "metrics", "paired", "cost", "diagnostics"):
        assert mine[part] == theirs[part]
    assert theirs["provenance"]["num_processes"] == 2
    assert {name: stage["num_processes"] for name, stage in mine["provenance"]["stages"].items() if name != "row"} == {
        **dict.fromkeys(("calibration", "samples", "scores", "fp32_samples", "fp32_scores", "network_error"), 1),
        "quantized": 2,
    }
    assert done.stdout.count("row.json: ") == 1 and done.stderr.count(" starts: ") == 1
    folder = next(two.glob("runs/*"))
    assert {path.name for path in folder.iterdir()} == {
        ".hydra",
        "dqbench.log",
        "row.json",
        "samples.png",
        "curves.png",
    }
    assert folder.joinpath("dqbench.log").read_text().count(" starts: ") == 1
    assert not list(two.rglob("*.part")) and not list(two.rglob("*.tmp"))


@pytest.mark.slow
def test_one_process_fails_for_all_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    failed = launch(__file__, *CELL, f"paths.results={two}")
    told = [line for line in failed.stderr.splitlines() if line.startswith("dqbench: ")]
    assert failed.returncode != 0 and len(told) == 1 and "no luck in process 1" in told[0], failed.stderr
    folder = next(path for path in two.glob("runs/*") if not (path / "row.json").exists())
    assert "Traceback" in (folder / "dqbench.log").read_text()
    for results in (one, two):  # in two, the text cell is done, and two units of the other one are
        dqbench.run([*TEXT, f"paths.results={results}"])
        quantize(results)
    assert_equal(one, two)
    stages = {path.parents[1].name: json.loads(path.read_text()) for path in two.glob("cache/*/*/manifest.json")}
    assert stages["agreement"]["stamp"]["num_processes"] == 2
    resumed = [json.loads(path.read_text())["resumed"] for path in two.glob("cache/quantized/*/manifest.json")]
    assert sorted(resumed) == [False, True]


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """What torchrun tells a process."""
    file = tmp_path / "attempt_0" / "1" / "error.json"
    file.parent.mkdir(parents=True)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    return monkeypatch


@pytest.mark.parametrize(
    ("wanted", "gpus", "found"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:1"),
        ("cuda", 4, "cuda:1"),
        ("cpu", 2, "cpu"),
        (
            "auto",
            1,
            "2 processes need as many GPUs, 1 are here; allowed: --num_processes 1 or fewer, or runtime.device",
        ),
        ("cuda:0", 2, "runtime.device=cuda:0 is one GPU for 2 processes; allowed: auto, cuda"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(second_of_two, wanted: str, gpus: int, found: str) -> None:
    second_of_two.setattr(torch.cuda, "device_count", lambda: gpus)
    try:
        assert choose_device(wanted) == found
    except UserError as error:
        assert str(error).startswith(found)


def test_the_first_to_fail_tells_and_is_heard(second_of_two, capfd) -> None:
    processes.begin()
    print("not heard")
    processes.tell("the reason")
    processes.tell("what followed from it")
    sys.stdout = sys.__stdout__
    assert capfd.readouterr() == ("", "dqbench: the reason\n")


def test_one_process_in_place_of_several_says_so(monkeypatch, capsys) -> None:
    """What `accelerate launch --cpu --num_processes 2` starts."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    processes.begin()
    assert capsys.readouterr().err.startswith("dqbench: accelerate was asked for several processes and has started one")


def test_several_machines_are_refused(second_of_two) -> None:
    second_of_two.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match="one machine"):
        processes.join("cpu")


@pytest.mark.parametrize("given", [["--help"], ["seed=1", "bits=w4a4", "--cfg", "job"], ["-m", "seed=0,1"], []])
def test_a_follower_makes_no_folder_whatever_the_command_line(given: list[str]) -> None:
    argv = ["dqbench", *given]
    follow(argv)
    read_flags(argv)  # Hydra's parser takes it
    assert "hydra.output_subdir=null" in argv and set(given) <= set(argv)


def test_work_is_not_divided_before_the_processes_have_met(second_of_two) -> None:
    assert processes.split([1, 2, 3]) == [1, 2, 3] and processes.agreed(lambda: 5) == 5 and processes.is_main()


if __name__ == "__main__":
    from dqbench.__main__ import main
    from dqbench.quant import reconstruct

    results = sys.argv[-1]
    dqbench.run([*TEXT, results])
    learn, left = reconstruct.learn_rounding, iter(range(2))

    def learn_rounding(*arguments: Any) -> float:
        if os.environ["RANK"] == "1" and next(left, None) is None:
            raise RuntimeError("no luck in process 1")
        return learn(*arguments)

    reconstruct.learn_rounding = learn_rounding
    main()
