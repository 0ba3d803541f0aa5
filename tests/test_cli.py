"""The command line as a new user meets it: wrong input is one line with what is allowed, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import dqbench.__main__ as cli
from dqbench import stages
from dqbench.config import compose
from dqbench.launching.searchpath import presets
from dqbench.models import ZOO
from dqbench.studies import iso_bits

Run = Callable[..., tuple[int, str, list[str]]]
TINY = ("debug=tiny", "metrics=none", "tracking=none")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def run(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """run(*overrides) -> (exit status, stdout, lines of stderr) of the command line in this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*overrides: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["dqbench", *TINY, f"paths.results={results}", *overrides])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        shown = capsys.readouterr()
        return status, shown.out, shown.err.splitlines()

    yield call
    root.handlers[:], root.level = handlers, level


def row(results: Path) -> dict:
    """The one row below `results`."""
    (file,) = results.glob("runs/*/row.json")
    return json.loads(file.read_text())


BAD = {
    "method=foo": "method=foo is unknown; allowed: awq, fp32, gptq, ",
    "method/ablation=foo": "method/ablation=foo is unknown; allowed: cnc, ",
    "bits=w5a9": "bits=w5a9 is unknown; allowed: w2a32, w2a4, ",
    "model=digit_ddpm": "model=digit_ddpm is unknown; did you mean digits_ddpm? allowed: ddpm_cifar10, digits_ddpm, ",
    "debug=tinny": "debug=tinny is unknown; did you mean tiny? allowed: tiny",
    "+sweeps=typo": f"sweeps=typo is unknown; allowed: {', '.join(presets()) or 'none, sweeps/ is empty'}",
    "hydra/launcher=acelerate": "hydra/launcher=acelerate is unknown; did you mean accelerate? allowed: accelerate, ",
    "hydra/launcher=slrm": "hydra/launcher=slrm is unknown; did you mean slurm? allowed: ",
    "scale=ful": "scale=ful is unknown; allowed: mini, full",
    "scale=full": "scale=full has no meaning without a preset of a paper's table; see +sweeps=",
    "setting=bedrooms": "setting=bedrooms is unknown; did you mean bedrooms200? allowed: bedrooms200, ",
    "bits.wieght=4": "bits.wieght is unknown; did you mean weight? allowed in bits: weight, act, attention, softmax",
    "recon.itres=3": "recon.itres is unknown; did you mean iters? allowed in recon: iters, iters_act, ",
    "method.spilt=true": "method.spilt is unknown; did you mean split? allowed in method: _target_, name, ",
    "method.recon.iters=3": "method.recon.iters cannot be set: method.recon follows recon; set recon.iters",
    "methd=rtn": "methd is unknown; did you mean method? allowed: model, base, method, bits, ",
    "+bits.other=4": "bits.other is unknown; allowed: weight, act, attention, softmax",
    "+other=4": "other is unknown; allowed: model, base, method, bits, ",
    "+method.other=4": "method.other is unknown; allowed in method: ",
    "sampler.kwargs.clip=1": "sampler.kwargs.clip: sampler.kwargs is empty; add a key to it with +sampler.",
    "+sampler.kwargs.clip=1": "sampler.kwargs.clip has no meaning for DDIMScheduler; it takes: num_train_timesteps, ",
    "bits.weight=four": "bits.weight=four has the wrong type; allowed: an integer",
    "bits.weight=null": "bits.weight=null has the wrong type; allowed: an integer",
    "recon.iters=abc": "recon.iters=abc has the wrong type; allowed: an integer",
    "recon.iters=1.5": "recon.iters=1.5 has the wrong type; allowed: an integer",
    "recon.beta=3": "recon.beta=3 has the wrong type; allowed: a list, as in [a,b]",
    "recon.beta=[a,b]": "recon.beta[0]=[a,b] has the wrong type; allowed: a list of numbers",
    "recon.beta=[1]": "recon.beta=[1.0] is not usable; allowed: two numbers, start and end",
    "sampler.eta=x": "sampler.eta=x has the wrong type; allowed: a number",
    "runtime.force=maybe": "runtime.force=maybe has the wrong type; allowed: true or false",
    "paths=x": "paths=x has the wrong type; allowed: its keys one by one: results, cache",
    "bits=4": "Config group override must be a string or a list. Got int",
    "method.split=banana": "method.split=banana has the wrong type; allowed: true or false",
    "method.weight.symmetric=banana": "method.weight.symmetric=banana has the wrong type; allowed: true or false",
    "method._target_=dqbench.nothing.X": "method._target_=dqbench.nothing.X is no class ",
    "tracking._target_=dqbench.tracking.Nothing": "tracking._target_=dqbench.tracking.Nothing is no class ",
    "bits.attention=${other}": "bits.attention: Interpolation key 'other' not found",
    "bits.weight=1": "bits.weight=1 is not supported; allowed: 2 to 8, or 16 and 32 for full precision",
    "bits.act=9": "bits.act=9 is not supported; allowed: 2 to 8, or 16 and 32 for full precision",
    "bits.softmax=64": "bits.softmax=64 is not supported; allowed: 2 to 8, or 16 and 32 for full precision",
    "sampler.eta=-1": "sampler.eta=-1.0 is out of range; allowed: 0 to 1",
    "sampler.eta=nan": "sampler.eta=nan is out of range; allowed: 0 to 1",
    "calib.mean=nan": "calib.mean=nan is out of range; allowed: a finite number",
    "recon.iters=-1": "recon.iters=-1 is out of range; allowed: 0 or more",
    "calib.steps=9": "calib.steps=9 is out of range; allowed: 1 to 4 (sampler.steps)",
    "calib.step=4": "calib.step=4 is out of range; allowed: 0 to 3 (sampler.steps - 1)",
    "sampler.steps=2000": "sampler.steps=2000 is more than the model was trained with; allowed: 1 to 1000",
    "sampler.spacing=linear": "sampler.spacing=linear is unknown; allowed: leading, trailing, linspace, quad",
    "sampler.scheduler=DDIMSchedular": "sampler.scheduler=DDIMSchedular is unknown; ",
    "runtime.device=gpu": "runtime.device=gpu is unknown; allowed: auto, cpu, cuda, cuda:N",
    "runtime.device=cuda:99": "runtime.device=cuda:99: torch ",
    "model.path=/nowhere": "model.path=/nowhere: no such folder; give a diffusers folder or a hub id",
    "model.path=some/hub-id": "some/hub-id/model_index.json was not found on the hub or in its cache",
    "model.path=zoo:typo": "model.path=zoo:typo: no such miniature; shipped: digits_ddpm",
    "model.denoiser=transformer": "names no scheduler or no transformer",
    "bits.weight=[": "'bits.weight=[' cannot be read; write key=value, quoting special characters",
    "--fast": "--fast is no flag; write overrides as key=value, after the flags; see --help",
    "--cfg": "argument --cfg/-c: expected one argument; see --help",
    "foo": "'foo' cannot be read; write key=value",
    "a=b=c": "'a=b=c' cannot be read; write key=value",
    "method=fp32,rtn": "method=fp32,rtn names several values; add -m to run each, or write a list as key=[a,b]",
    "seed=range(3)": "seed=range(3) names several values; add -m",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(override: str, run: Run, results: Path) -> None:
    status, out, err = run(override)
    assert status == 2 and out == "" and not results.exists()
    (line,) = err
    assert line.startswith("dqbench: ") and BAD[override] in line and len(line) < 600, line


def test_eta_needs_a_scheduler_that_has_it(run: Run, results: Path) -> None:
    status, _, err = run("sampler=dpmpp20", "sampler.eta=0.5", "sampler.steps=4")
    assert (status, results.exists()) == (2, False)
    assert err == [
        "dqbench: sampler.eta=0.5 has no meaning for DPMSolverMultistepScheduler; allowed: 0 (eta is DDIM's)"
    ]


def damaged(tmp_path: Path, damage: Callable[[Path], None]) -> str:
    """model.path=COPY of the shipped digits pipeline, damaged."""
    folder = tmp_path / "pipeline"
    shutil.copytree(ZOO / "digits_ddpm", folder)
    damage(folder)
    return f"model.path={folder}"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, Callable[[Path], None]] = {
    "model_index.json is missing": lambda folder: (folder / "model_index.json").unlink(),
    "model_index.json cannot be read": lambda folder: truncate(folder / "model_index.json"),
    f"{WEIGHTS} is damaged": lambda folder: truncate(folder / WEIGHTS),
    "unet holds no weights; needed: a .safetensors file": lambda folder: (folder / WEIGHTS).unlink(),
    "scheduler_config.json cannot be read": lambda folder: shutil.rmtree(folder / "scheduler"),
}


@pytest.mark.parametrize("complaint", DAMAGE)
def test_damaged_checkpoint_is_named_before_it_is_used(complaint: str, run: Run, results: Path, tmp_path: Path) -> None:
    status, _, err = run(damaged(tmp_path, DAMAGE[complaint]))
    assert status == 2 and not results.exists()
    (line,) = err
    assert complaint in line and "; " in line


def test_bad_cell_of_a_sweep_stops_it_before_any_cell_runs(run: Run, results: Path) -> None:
    for bad, complaint in {"method=fp32,foo": "method=foo is unknown", "bits.weight=8,9": "bits.weight=9 is"}.items():
        status, _, err = run("-m", bad)
        assert status == 2 and not results.exists()
        assert len(err) == 1 and complaint in err[0]


def test_failed_cell_is_told_at_once_and_the_sweep_goes_on(
    run: Run, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dqbench.methods.rtn import RTN

    def fail(*args: object) -> None:
        raise RuntimeError("the\nreason")

    monkeypatch.setattr(RTN, "__call__", fail)
    status, out, err = run("-m", "method=rtn,fp32,ptq4dm")
    assert status == 1
    told = [index for index, line in enumerate(err) if "failed: RuntimeError: the reason (" in line and "=rtn" in line]
    later = [index for index, line in enumerate(err) if " starts: " in line and "method=fp32" in line]
    assert len(told) == 1 and told < later and not any("Traceback" in line for line in err)
    assert "2 of 3 rows" in out and "ptq4dm" in out and "rtn" not in out
    logs = [file.read_text() for file in results.glob("runs/*/dqbench.log")]
    assert sum("Traceback" in text for text in logs) == 1, "the run's own log has the traceback"


def test_second_invocation_runs_nothing_and_prints_the_same_table(run: Run, results: Path) -> None:
    arguments = ("-m", "method=fp32,rtn")
    status, table, _ = run(*arguments)
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()}
    assert status == 0 and "rtn" in table and {entry.name for entry in results.iterdir()} == {"runs", "cache", ".sweep"}
    code = "import sys, dqbench.__main__ as m; m.main(); assert 'torch' not in sys.modules, 'torch was imported'"
    command = [sys.executable, "-c", code, *TINY, f"paths.results={results}", *arguments]
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[1])
    assert (again.stdout, again.stderr) == (table, "")
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()} == before


def test_results_hold_what_they_should_and_nothing_else(run: Run, results: Path) -> None:
    status, out, _ = run("method=rtn")
    assert status == 0
    (folder,) = results.glob("runs/*")
    assert {file.name for file in folder.iterdir()} == {
        ".hydra",
        "dqbench.log",
        "row.json",
        "samples.png",
        "curves.png",
    }
    assert str(folder / "row.json") in out and str(folder / "samples.png") in out
    stages = {"trajectory", "calibration", "quantized", "samples", "scores", "noise_error", ".locks"}
    assert {entry.name for entry in (results / "cache").iterdir()} == stages
    assert not [
        file for file in results.rglob("*") if file.suffix in {".lock", ".tmp", ".part"} or file.name == "scratch"
    ]


def test_damaged_artifact_is_rebuilt_with_a_warning_into_the_same_row(run: Run, results: Path) -> None:
    run("method=rtn")
    first = row(results)
    for file in (
        *results.glob("cache/quantized/*/denoiser.safetensors"),
        *results.glob("cache/samples/*/sample.*.npy"),
    ):
        truncate(file)
    stages._verified.clear()  # a process looks at an artifact once
    status, _, err = run("method=rtn", "runtime.force=true")
    assert status == 0
    assert sum("is damaged" in line and "building it again" in line for line in err) >= 2
    assert numbers(row(results)) == numbers(first)


def numbers(content: dict) -> dict:
    """A row without what may differ between two runs of the same cell."""
    kept = {key: value for key, value in content.items() if key != "timing"}
    return {**kept, "provenance": {**content["provenance"], "time": ""}}


def test_nan_samples_fail_loudly_without_a_row(run: Run, results: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def poison(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors["conv_out.bias"] += float("nan")
        save_file(tensors, folder / WEIGHTS)

    status, out, err = run("method=fp32", damaged(tmp_path, poison))
    assert status == 1 and out == ""
    assert "failed: DegenerateSamples: sample 0 holds NaN or infinity" in err[-1]
    assert not list(results.rglob("row.json")) and not list(results.rglob("samples.png"))


@pytest.mark.parametrize("victim", ["row.json", "manifest.json", "sample.0000000-0000008.npy"])
def test_full_disk_is_one_line_and_the_next_run_goes_on(
    victim: str, run: Run, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: str | os.PathLike[str], target: str | os.PathLike[str], **kwargs: object) -> None:
        if Path(target).name == victim:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", full)
    status, out, err = run("method=rtn")
    assert status == 1 and out == ""
    assert "No space left on device" in err[-1] and sum("No space" in line for line in err) == 1
    assert not list(results.rglob("row.json")) and not list(results.rglob("*.tmp"))
    monkeypatch.setattr(os, "replace", real)
    status, *_ = run("method=rtn")
    assert status == 0 and row(results)["status"] == "done"


def test_damaged_published_rows_are_one_line_after_a_sweep_too(run: Run, results: Path) -> None:
    results.mkdir()
    (results / "rows.jsonl").write_text("<<<<<<< ours\n")
    status, _, err = run("-m", "method=fp32,rtn")
    assert status == 2 and err[-1].startswith("dqbench: ") and "rows.jsonl line 1 is damaged" in err[-1]
    assert len(list(results.glob("runs/*/row.json"))) == 2


def test_help_tells_what_can_be_chosen(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, [])
    assert "qdiffusion*" in out and "w4a8*" in out and "130 interrupted" in out and "Powered by Hydra" not in out
    assert max(map(len, out.splitlines())) <= 132 and "${" not in out


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"mini": {"metod": "fp32,rtn"}}, "table.mini.metod is unknown; did you mean method? allowed: "),
        ({"mini": {"method": "fp32"}, "paper": "tfqm"}, "table.paper=tfqm is unknown; allowed: "),
        ({"study": "isobits", "mini": {"seed": "0,1"}}, "table.study=isobits is unknown; allowed: iso_bits, rate"),
        ({"study": "iso_bits"}, "sweeps/mine: table.mini is missing; needed: the axes to sweep"),
    ],
)
def test_a_typo_in_a_preset_is_one_line_before_anything_starts(run: Run, node, told, tmp_path, monkeypatch) -> None:
    (tmp_path / "sweeps").mkdir()
    params = "${table.${oc.select:scale,mini}}"
    preset = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": params}}, "table": {"caption": "mine", **node}}
    (tmp_path / "sweeps" / "mine.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(preset))
    monkeypatch.chdir(tmp_path)
    status, _, (line,) = run("+sweeps=mine")
    assert status == 2 and line.startswith("dqbench: ") and told in line
    assert not (tmp_path / "results").exists()


SMALL = ("cache", "claims", "cost", "doctor", "export", "load", "plan", "results", "studies.iso_bits", "tables")


@pytest.mark.parametrize("name", [*SMALL, "studies.rate_distortion"])
def test_help_of_the_small_commands_is_how_they_are_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "-h"])
    with warnings.catch_warnings(action="ignore"):  # that the module has been imported before
        runpy.run_module(f"dqbench.{name}", run_name="__main__", alter_sys=True)
    assert f"python -m dqbench.{name}" in capsys.readouterr().out


def test_a_sweep_that_names_a_study_ends_in_its_pages(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(iso_bits, "write", lambda results: written.append(results) or {})
    named = compose([f"paths.results={tmp_path}", "+table={study: iso_bits}"])
    monkeypatch.setattr(cli, "cells", [named, named, compose([f"paths.results={tmp_path}"])])
    cli.write_studies()
    assert written == [tmp_path]
