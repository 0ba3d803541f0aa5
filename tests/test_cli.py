"""The command line as a new user meets it: wrong input is one line with what is allowed, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dqbench.__main__ as cli
from dqbench.launching.searchpath import presets
from dqbench.models import ZOO

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
    "method=foo": "method=foo is unknown; allowed: fp32, ptq4dm, ptq4dm_official, qdiffusion, qdiffusion_official, rtn",
    "bits=w5a9": "bits=w5a9 is unknown; allowed: w2a32, w2a4, ",
    "model=digit_ddpm": "model=digit_ddpm is unknown; did you mean digits_ddpm? allowed: ddpm_cifar10, digits_ddpm, ",
    "debug=tinny": "debug=tinny is unknown; did you mean tiny? allowed: tiny",
    "+sweeps=typo": f"sweeps=typo is unknown; allowed: {', '.join(presets()) or 'none, sweeps/ is empty'}",
    "hydra/launcher=slrm": "hydra/launcher=slrm is unknown; allowed: basic",
    "bits.wieght=4": "bits.wieght is unknown; did you mean weight? allowed in bits: weight, act, attention, softmax",
    "recon.itres=3": "recon.itres is unknown; did you mean iters? allowed in recon: iters, iters_act, ",
    "method.spilt=true": "method.spilt is unknown; did you mean split? allowed in method: _target_, name, ",
    "method.recon.iters=3": "method.recon.iters cannot be set: method.recon follows recon; set recon.iters",
    "methd=rtn": "methd is unknown; did you mean method? allowed: model, method, bits, ",
    "+bits.other=4": "bits.other is unknown; allowed: weight, act, attention, softmax",
    "+other=4": "other is unknown; allowed: model, method, bits, ",
    "+method.other=4": "method.other is unknown; allowed in method: ",
    "sampler.kwargs.clip=1": "sampler.kwargs.clip: sampler.kwargs is empty; add a key to it with +sampler.kwargs.clip=VALUE",
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
    "model.path=some/hub-id": "model digits_ddpm: some/hub-id/model_index.json was not found on the hub or in its cache",
    "model.path=zoo:typo": "model.path=zoo:typo: no such miniature; shipped: digits_ddpm",
    "model.denoiser=transformer": "names no scheduler or no transformer",
    "bits.weight=[": "'bits.weight=[' cannot be read; write key=value, quoting special characters",
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
