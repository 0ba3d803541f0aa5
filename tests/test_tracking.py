"""W&B offline runs, read back from disk: what a row holds is in them, and W&B can never cost a run its row."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dqbench.diagnostics import curves
from dqbench.errors import UserError
from dqbench.results import Row
from dqbench.tracking import flat, has_key, track

METRIC = {
    "value": 13.0,
    "low": 12.0,
    "high": 14.0,
    "n": 64,
    "extractor": "e",
    "protocol": "p",
    "higher_is_better": False,
}


def config(folder: Path, **tracking: Any) -> DictConfig:
    node = {"_target_": "dqbench.tracking.Wandb", "project": "p", "entity": None, "group": "sweep"}
    node = {**node, "mode": "offline", "dir": str(folder), **tracking}
    return OmegaConf.create({"model": {"name": "digits_ddpm"}, "twice": "${model.name}", "tracking": node})


def row(run_id: str) -> Row:
    cost = {"bops": 1.25e9, "convention": "sum of MACs x b_w x b_a"}
    return Row(run_id, {}, {"fd_digits": METRIC}, {}, {"psnr": METRIC}, cost, {"generate_s": 3.0}, {"git_commit": None})


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file, which is a LevelDB log: 32 KiB blocks of crc32, length, type, payload."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""  # 7: the file's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no room for a record's header: padding
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def read_back(folder: Path) -> list[dict[str, Any]]:
    """Each offline run below the folder as {run, config, summary, exit, folder}."""
    import wandb

    wandb.teardown()  # waits until W&B's own process has written everything
    found = []
    for path in sorted(folder.rglob("*.wandb")):
        content: dict[str, Any] = {"summary": {}, "artifacts": [], "folder": path.parent}
        for record in records(path):
            if record.HasField("run"):
                content["run"] = record.run
                content["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("artifact"):
                content["artifacts"].append(record.artifact)
            if record.HasField("exit"):
                content["exit"] = record.exit.exit_code
            updates = [*record.summary.update, *record.history.item]
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
            content["summary"] |= values
        found.append(content)
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_offline_run_holds_row_config_and_grid(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    Image.new("L", (16, 16), 128).save(tmp_path / "grid.png")
    with track(config(tmp_path), "0123456789ab") as tracker:
        tracker.log_row(row("0123456789ab"))
        tracker.log_image("samples", tmp_path / "grid.png")
    assert capfd.readouterr() == ("", "")  # the terminal belongs to the run's own table
    (run,) = read_back(tmp_path)
    assert (run["run"].run_id, run["run"].run_group, run["run"].project) == ("0123456789ab", "sweep", "p")
    assert run["config"]["model"] == {"name": "digits_ddpm"} and run["config"]["twice"] == "digits_ddpm"
    wanted = {"metrics/fd_digits": 13.0, "metrics/fd_digits/low": 12.0, "metrics/fd_digits/n": 64, "paired/psnr": 13.0}
    wanted |= {"cost/bops": 1.25e9, "timing/generate_s": 3.0, "status": "done"}
    assert {key: run["summary"].get(key) for key in wanted} == wanted
    assert (run["folder"] / "files" / run["summary"]["samples/path"]).is_file()
    assert run["exit"] == 0


def test_every_group_of_curves_is_a_chart(tmp_path: Path) -> None:
    groups = {
        "noise error": curves([980, 960], {"noise error": [0.1, 0.2]}),
        "SNR": curves([980, 960], {"w4a4": [None, 2.0], "w4a8": [3.0, 4.0]}, log=True),
    }
    with track(config(tmp_path), "id") as tracker:
        tracker.log_curves(groups)
    (run,) = read_back(tmp_path)
    tables = {}
    for name in groups:
        content = json.loads((run["folder"] / "files" / run["summary"][f"{name}_table/path"]).read_text())
        tables[name] = sorted(tuple(row) for row in content["data"])
    assert tables["noise error"] == [(960, "noise error", 0.2), (980, "noise error", 0.1)]
    assert tables["SNR"] == [(960, "w4a4", 2.0), (960, "w4a8", 4.0), (980, "w4a8", 3.0)]


def test_same_id_continues_and_an_error_is_marked_and_passed_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reconstruction"), track(config(tmp_path), "same"):
        raise RuntimeError("reconstruction diverged")
    with track(config(tmp_path), "same") as tracker:
        tracker.log_row(row("same"))
    killed, resumed = sorted(read_back(tmp_path), key=lambda run: len(run["summary"]))
    assert [killed["run"].run_id, resumed["run"].run_id] == ["same", "same"]
    assert (killed["exit"], resumed["exit"]) == (1, 0) and resumed["summary"]["metrics/fd_digits"] == 13.0


def test_wandb_cannot_fail_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING), track(config(tmp_path / "file"), "id") as tracker:
        tracker.log_row(row("id"))
        reached = True
    assert reached and "W&B could not start" in caplog.text
    with caplog.at_level(logging.WARNING), track(config(tmp_path), "id") as tracker:
        tracker.log_image("samples", tmp_path / "absent.png")
    assert "did not take samples" in caplog.text


def test_no_tracking_imports_no_wandb() -> None:
    code = """
import sys
from omegaconf import OmegaConf
from dqbench.tracking import track
cfg = OmegaConf.create({"tracking": {"_target_": "dqbench.tracking.NoTracking"}})
with track(cfg, "id") as tracker:
    tracker.log_image("samples", None); tracker.log_curves({}); tracker.log_row(None)
sys.exit("wandb" in sys.modules or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_mode_is_a_users_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"tracking\.mode=sometimes.*offline"),
        track(config(tmp_path, mode="sometimes"), "id"),
    ):
        pass


def test_a_key_is_found_without_asking_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()


def test_flat_names() -> None:
    assert flat({"metrics": {"fd": {"value": 1, "n": 2}}, "status": "done"}) == {
        "metrics/fd": 1,
        "metrics/fd/n": 2,
        "status": "done",
    }


SWEEP = """
# A sweep whose cells cost nothing, twice; rtn's cell is killed where a file says so.
import os, signal, sys
from pathlib import Path
import dqbench.run
from dqbench import __main__
from dqbench.claims import book
from dqbench.identity import identity, run_id
from dqbench.results import Row

METRIC = {"value": 1.0, "low": 0.0, "high": 2.0, "n": 8, "extractor": "e", "protocol": "p", "higher_is_better": False}

def run(cfg, folder):
    if cfg.method.name == "rtn" and (kill := Path(cfg.paths.results) / "kill").exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    cost = {"bops": 1e9, "size_bytes": 10, "bits_per_weight": float(cfg.bits.weight), "bits_per_act": 8.0}
    row = Row(run_id(cfg), identity(cfg), {"fd": METRIC}, {"fd": METRIC}, {}, cost, {}, {"time": "now"})
    row.write(folder)
    return row

sys.modules["dqbench.run"].run = run
papers, claims = book.read()
book.read = lambda: (papers, claims[:1])
for _ in range(2):
    __main__.main()
"""


def sweep(results: Path) -> int:
    """The exit status of a sweep of two cells, started twice in one process."""
    cells = ["-m", "method=fp32,rtn", "tracking.mode=offline", f"paths.results={results}"]
    done = subprocess.run([sys.executable, "-c", SWEEP, *cells], capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.slow
def test_a_sweep_is_one_group_and_tells_its_table_and_the_claims_once(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "kill").touch()
    assert sweep(results) == -9 and not list(results.glob(".sweep/*/logged.json"))
    assert sweep(results) == 0
    cells = {path.parent.name for path in results.glob("runs/*/row.json")}
    started = [(path.parents[1].name, path.name.rpartition("-")[2]) for path in results.glob("runs/*/wandb/offline-*")]
    assert len(cells) == 2 and len(started) == 3  # the killed one was started again, under its own id
    assert set(started) == {(name, name) for name in cells}

    found = [run for run in read_back(results) if "run" in run]  # nothing of the killed one may have reached the disk
    assert {run["run"].run_group for run in found} == {"digits_ddpm"}
    assert {run["run"].run_id for run in found if not run["run"].job_type} == cells
    (summary,) = (
        run for run in found if run["run"].job_type == "sweep"
    )  # one, though the sweep was started twice more
    assert summary["run"].display_name == "digits_ddpm" and summary["exit"] == 0
    assert set(summary["config"]["cells"]) == cells and summary["summary"]["rows"] == 2
    assert (summary["folder"] / "files" / summary["summary"]["claims/path"]).is_file()
    (artifact,) = summary["artifacts"]
    files = {item.path: Path(item.local_path) for item in artifact.manifest.contents}
    assert results in files["claims.md"].parents and "## PTQ4DM" in files["claims.md"].read_text()
    table = json.loads(files["table.table.json"].read_text())
    told = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [(line["method"], line["fd"], line["run"] in cells) for line in told] == [
        ("fp32", 1.0, True),
        ("rtn", 1.0, True),
    ]
