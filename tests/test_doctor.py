"""The doctor: a working environment passes, each fault is named with its cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dqbench import doctor
from dqbench.errors import UserError


def test_this_environment_can_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as status:
        doctor.main([f"results={tmp_path}", f"json={tmp_path / 'doctor.json'}"])
    report = json.loads((tmp_path / "doctor.json").read_text())
    topics = {finding["topic"] for finding in report}
    assert status.value.code == 0, [finding for finding in report if finding["blocks"]]
    assert topics >= {"python", "packages", "torch", "devices", "configs", "disk", "memory", "w&b", "hub", "slurm"}
    assert "cpu (" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("no torch")])
def test_mismatched_torchvision_blocks(error: Exception, monkeypatch, tmp_path: Path, capsys) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.ops.nms", broken)
    with pytest.raises(SystemExit) as status:
        doctor.main([f"results={tmp_path}"])
    out = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 1 and str(error) in out and "must: torch and torchvision do not fit together" in out


def test_requirements_are_compared_with_what_is_installed() -> None:
    good, old, absent = "numpy>=1.0", "numpy>=99", "no-such-library>=1"
    faults = [finding for finding in doctor.packages([good, old, absent]) if finding.blocks]
    assert [finding.fix for finding in faults] == [f"install {old}: make install", f"install {absent}: make install"]
    assert faults[1].found == "no-such-library absent"
    assert {"torch", "diffusers", "hydra-core"} <= {line.split(">")[0] for line in doctor.requirements()}


@pytest.mark.parametrize(("free", "fix", "blocks"), [(1e6, True, True), (1e9, True, False), (1e12, False, False)])
def test_disk_space(free: float, fix: bool, blocks: bool, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    finding = doctor.disk(tmp_path / "not" / "yet" / "there")
    assert (bool(finding.fix), finding.blocks) == (fix, blocks)


def test_results_that_are_a_file_block(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    assert doctor.disk(tmp_path / "results").blocks


def test_wandb_mode_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of-line")
    assert "online, offline, disabled" in doctor.wandb_mode().fix
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor.wandb_mode() == doctor.Finding("w&b", "offline (WANDB_MODE)")


def test_unknown_argument() -> None:
    with pytest.raises(UserError, match=r"result=.*allowed.*results=DIR"):
        doctor.main(["result=x"])
