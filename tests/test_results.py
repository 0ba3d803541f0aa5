"""Rows: whole or absent, strict JSON, published without loss under concurrent calls, readable as tables."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dqbench.errors import UserError
from dqbench.provenance import git_state, provenance
from dqbench.report import show
from dqbench.results import SCHEMA, Row, finished, main, publish, published, rows, runs

METHODS = ("fp32", "rtn", "qdiffusion")


def metric(value: float, half: float = 0.5, higher: bool = False, n: int = 1024) -> dict:
    interval = {"value": value, "low": value - half, "high": value + half}
    return {**interval, "n": n, "extractor": "digits_classifier", "protocol": "bootstrap", "higher_is_better": higher}


def make_row(run_id: str = "9ac1cb80d1f2", method: str = "qdiffusion", fd: float = 13.25) -> Row:
    full = {"fd_digits": metric(11.5), "recall_digits": metric(0.887, 0.01, True)}
    cost = {"bops": 1.25e9, "bops_fp32": 32e9, "size_bytes": 620_000, "size_bytes_fp32": 4_400_000}
    return Row(
        run_id,
        config={
            "model": {"name": "digits_ddpm"},
            "method": {"_target_": f"dqbench.methods.{method}.Method", "name": method},
            "bits": {"weight": 4, "act": 8},
            "sampler": {"scheduler": "DDIMScheduler", "steps": 50},
        },
        metrics=full if method == "fp32" else {"fd_digits": metric(fd), "recall_digits": metric(0.886, 0.01, True)},
        reference=full,
        paired={} if method == "fp32" else {"psnr": metric(25.5, 0.25, True)},
        cost={**cost, "bits_per_weight": 4.31},
        timing={"generate_s": 30.0},
        provenance=provenance("cpu", "float32", "abc", None),
        diagnostics={"noise_error": [0.1, 0.2]},
    )


def write(results: Path, row: Row) -> Row:
    row.write(results / "runs" / row.run_id)
    return row


def test_row_survives_disk(tmp_path: Path) -> None:
    row = make_row()
    assert row.write(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "row.json"
    assert Row.read(tmp_path / "new" / "folder") == row


def test_who_reads_while_a_row_is_replaced_sees_a_whole_one(tmp_path: Path) -> None:
    with make_row(fd=1.0).write(tmp_path).open() as reader:
        make_row(fd=2.0).write(tmp_path)
        assert json.load(reader)["metrics"]["fd_digits"]["value"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_bad_value_is_named_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    row = make_row()
    row.metrics["fd_digits"]["value"] = value
    with pytest.raises((ValueError, TypeError), match=r"metrics\.fd_digits\.value"):
        row.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_disk_keeps_the_old_row_and_leaves_nothing_else(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    old = make_row(fd=1.0)
    old.write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses the 1001st byte of a file
    try:
        with pytest.raises(OSError, match=r"cannot write .*row\.json") as caught:
            make_row(fd=2.0).write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["row.json"] and Row.read(tmp_path) == old


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace("13.25", "NaN"), "damaged"),
        (lambda text: text.replace('"timing"', '"timings"'), "damaged"),
        (lambda text: "[]", "not a row"),
        (lambda text: text.replace(f'"schema": {SCHEMA}', '"schema": 99'), "schema"),
    ],
)
def test_damaged_row_is_one_line_and_not_finished(tmp_path: Path, damage, message: str, caplog) -> None:
    path = make_row().write(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        Row.read(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert finished(tmp_path) is None
    assert str(path) in caplog.text


def test_publish_merges_replaces_and_is_stable(tmp_path: Path) -> None:
    first, second = write(tmp_path, make_row("b")), write(tmp_path, make_row("a"))
    write(tmp_path, replace(make_row("failed"), status="failed"))
    assert sorted(publish(tmp_path)) == ["a", "b"]
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert list(published(tmp_path)) == [second, first]
    assert publish(tmp_path) == [] and (tmp_path / "rows.jsonl").read_bytes() == before
    newer = write(tmp_path, make_row("b", fd=1.0))
    assert publish(tmp_path, ["b"]) == ["b"] and list(published(tmp_path)) == [second, newer]
    shutil.rmtree(tmp_path / "runs" / "a")
    newest = write(tmp_path, make_row("b", fd=2.0))
    assert rows(tmp_path) == [second, newest] and list(runs(tmp_path)) == [newest]


def test_publish_refuses_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, make_row("present"))
    write(tmp_path, replace(make_row("failed"), status="failed"))
    for run_id in ("absent", "failed"):
        with pytest.raises(UserError, match=f"{run_id}.*present"):
            publish(tmp_path, ["present", run_id])
    assert not (tmp_path / "rows.jsonl").exists()
    (tmp_path / "rows.jsonl").write_text("<<<<<<< HEAD\n")
    with pytest.raises(UserError, match="line 1"):
        publish(tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == "<<<<<<< HEAD\n"


def test_concurrent_publishers_lose_no_row(tmp_path: Path) -> None:
    names = [f"{worker}{index}" for worker in "abc" for index in range(8)]
    for name in names:
        write(tmp_path, make_row(name))
    code = "import sys; from dqbench.results import publish\n"
    code += "for i in range(8): publish(sys.argv[1], [f'{sys.argv[2]}{i}'])"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), worker]) for worker in "abc"]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert [row.run_id for row in published(tmp_path)] == sorted(names)


def test_command_shows_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = write(tmp_path, make_row())
    main(["publish", f"results={tmp_path}"])
    assert "1 new" in capsys.readouterr().out
    main(["show", row.run_id[:4], f"results={tmp_path}", f"json={tmp_path / 'out.json'}"])
    assert "13.25" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())[0]["run_id"] == row.run_id
    with pytest.raises(UserError, match="publish"):
        main(["publihs"])


def rendered(shown: list[Row], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show(shown, console)
    return console.export_text()


def test_run_table_compares_with_full_precision() -> None:
    lines = {line.split()[0]: line for line in rendered([make_row()]).splitlines() if line.split()}
    assert lines["fd_digits"].split()[2:] == ["11.50", "[11.00,12.00]", "13.25", "[12.75,13.75]", "+1.75", "✗"]
    assert lines["recall_digits"].split()[-2:] == ["-0.001", "≈"]  # the intervals overlap
    assert "25.50 [25.25,25.75]" in lines["psnr"] and lines["BOPs"].split()[-2:] == ["÷", "25.6"]
    assert "no speed-up is claimed" in lines["Fake"] and "n = 1,024" in lines["digits_ddpm"]


def test_metrics_of_other_sample_counts_say_so() -> None:
    row = make_row()
    row.paired["noise_error"] = metric(0.0712, 0.001, n=64)
    lines = {line.split()[0]: line.split() for line in rendered([row], 100).splitlines() if line.split()}
    assert (lines["fd_digits"][-1], lines["noise_error"][-1]) == ("1,024", "64")


@pytest.mark.parametrize("width", [80, 100])
def test_sweep_table_has_a_line_per_cell_and_fits(width: int) -> None:
    text = rendered([make_row(f"{i}" * 12, method) for i, method in enumerate(METHODS)], width)
    assert max(map(len, text.splitlines())) <= width
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in METHODS] == [
        "fp32",
        "qdiffusion",
        "rtn",
    ]
    assert "000000" in text and "digits_ddpm · DDIM 50 steps" in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state_is_that_of_our_own_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert git_state(tmp_path) == (None, None)
    (tmp_path / "dqbench").mkdir()
    (tmp_path / "dqbench" / "code.py").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    assert git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    assert git_state(tmp_path / "dqbench") == (None, None)  # a package inside somebody else's checkout
    (tmp_path / "rows.jsonl").write_text("results do not make code dirty")
    assert git_state(tmp_path)[1] is False
    (tmp_path / "dqbench" / "code.py").write_text("2")
    assert git_state(tmp_path)[1] is True
