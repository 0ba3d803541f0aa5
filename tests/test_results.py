"""Rows: whole or absent, strict JSON, published without loss under concurrent calls, shown as tables and curves."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats

from dqbench import provenance as provenance_module
from dqbench.diagnostics import curves, mean_over_chains, noise_error_curves, save_curves
from dqbench.errors import UserError
from dqbench.provenance import combine, git_state, provenance, stamp
from dqbench.report import show
from dqbench.results import SCHEMA, Row, check_strict, finished, main, publish, published, rows, runs

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
            "sampler": {"scheduler": "DDIMScheduler", "steps": 50, "num_samples": 1024},
            "seed": 0,
        },
        metrics=full if method == "fp32" else {"fd_digits": metric(fd), "recall_digits": metric(0.886, 0.01, True)},
        reference=full,
        paired={} if method == "fp32" else {"psnr": metric(25.5, 0.25, True)},
        cost={**cost, "bits_per_weight": 4.31},
        timing={"generate_s": 30.0},
        provenance=provenance("cpu", "float32", "abc", None),
        difference={} if method == "fp32" else {"fd_digits": delta(fd - 11.5), "recall_digits": delta(-0.001)},
        diagnostics={"noise_error": {"x": [980, 960], "x_label": "timestep", "lines": {"mean": [0.1, 0.2]}}},
    )


def delta(value: float, half: float = 0.125) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def write(results: Path, row: Row) -> Row:
    row.write(results / "runs" / row.run_id)
    return row


def test_row_survives_disk(tmp_path: Path) -> None:
    row = make_row()
    assert row.write(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "row.json"
    assert Row.read(tmp_path / "new" / "folder") == row


def test_rows_that_were_written_before_a_field_was_added_are_read(tmp_path: Path) -> None:
    row = make_row()
    path = row.write(tmp_path)
    content = json.loads(path.read_text())
    del content["difference"]
    path.write_text(json.dumps(content))
    assert Row.read(tmp_path) == replace(row, difference={})


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
    assert sorted(publish(tmp_path)) == ["a", "b"]
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert list(published(tmp_path)) == [second, first]
    assert publish(tmp_path) == [] and (tmp_path / "rows.jsonl").read_bytes() == before
    newer = write(tmp_path, make_row("b", fd=1.0))
    longer = write(tmp_path, make_row("bb"))  # of which b is the beginning
    assert publish(tmp_path, ["b"]) == ["b"] and list(published(tmp_path)) == [second, newer]
    shutil.rmtree(tmp_path / "runs" / "a")
    shutil.rmtree(tmp_path / "runs" / longer.run_id)
    newest = write(tmp_path, make_row("b", fd=2.0))
    assert rows(tmp_path) == [second, newest] and list(runs(tmp_path)) == [newest]


def test_publish_refuses_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, make_row("present"))
    with pytest.raises(UserError, match=r"absent.*present"):
        publish(tmp_path, ["present", "absent"])
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
    lines = {line.split()[0]: line for line in rendered([make_row()], 100).splitlines() if line.split()}
    values = ["11.50", "[11.00,12.00]", "13.25", "[12.75,13.75]"]
    assert lines["fd_digits"].split()[2:] == [*values, "+1.75", "±", "0.12", "✗"]
    assert lines["recall_digits"].split()[-4:] == ["-0.001", "±", "0.125", "≈"]
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
    assert "000000" in text and "digits_ddpm · DDIM 50 steps · 1,024 samples · seed 0" in text


@pytest.mark.parametrize("width", [80, 140])
def test_cells_of_a_sweep_are_told_apart_at_any_width(width: int) -> None:
    rows = [make_row(f"{i}" * 12) for i in range(4)]
    rows[1].config["recon"] = {"iters": 20000}
    rows[2].config["seed"] = 1
    rows[3].config["sampler"] |= {"eta": 1.0}
    lines = rendered(rows, width).splitlines()
    cells = {line.split()[-1]: line.split() for line in lines if line.strip().startswith("qdiffusion")}
    text = "\n".join(lines)
    assert len(cells) == 4 and max(map(len, lines)) <= width
    assert "recon.iters=20000" in text and "sampler.eta=1.0" in text
    left = {tuple(line[:4]) for line in cells.values()}  # method, bits, seed, settings or the number of a note
    assert len(left) == 4 and all(line[-2] != "…" for line in cells.values())


def test_noise_error_has_t_intervals_over_chains() -> None:
    errors = np.random.default_rng(0).random((5, 2, 3))  # chains, guidance halves, steps
    group = noise_error_curves(errors, [900, 500, 100])
    check_strict(group, "")
    assert (group["x"], group["x_label"]) == ([900, 500, 100], "timestep")
    of_chains = errors.mean(axis=1)
    low, high = stats.t.interval(0.95, 4, loc=of_chains.mean(axis=0), scale=stats.sem(of_chains))
    assert group["lines"]["noise error"] == pytest.approx((low + high) / 2, rel=1e-5)
    assert group["bands"]["noise error"] == pytest.approx((high - low) / 2, rel=1e-5)
    whole, over = mean_over_chains(errors), errors.mean(axis=(1, 2))
    assert (whole.low, whole.high) == pytest.approx(stats.t.interval(0.95, 4, loc=over.mean(), scale=stats.sem(over)))


def test_curves_are_drawn_a_panel_per_group_whole_or_not_at_all(tmp_path: Path) -> None:
    steps = [980, 490, 0]
    many = {f"head {i}": [0.9, None, 1.0] for i in range(25)}
    groups = {
        "noise error": curves(steps, {"noise error": [0.1, 0.2, 0.3]}, {"noise error": [0.01, 0.01, 0.02]}),
        "signal to noise": curves(steps, {"w4a4": [1e-3, 1, 1e3], "w4a8": [1e-2, 2, 1e4]}, log=True),
        "cosine": curves([0, 1, 2], many, x_label="step"),
    }
    sizes = []
    for count in (1, 2, 3):
        save_curves(dict(list(groups.items())[:count]), tmp_path / "curves.png")
        sizes.append(Image.open(tmp_path / "curves.png").size)
    (width, height), *_ = sizes
    assert sizes == [(width, height * count) for count in (1, 2, 3)]
    before = (tmp_path / "curves.png").read_bytes()
    with pytest.raises(KeyError):
        save_curves({"broken": {"x": [1]}}, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == before
    with pytest.raises(ValueError, match="curve a has 2 values at 3 places"):
        curves(steps, {"a": [1, 2]})
    assert curves([0.0], {"a": [1.23456789e-9]})["lines"]["a"] == [1.23457e-9]


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


def test_stamp_asks_git_once_and_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(provenance_module, "_git", lambda root, *arguments: calls.append(arguments))
    provenance_module._our_git_state.cache_clear()
    try:
        made = [stamp("cpu") for _ in range(3)]
    finally:
        provenance_module._our_git_state.cache_clear()
    assert made[0] == made[1] == made[2] == json.loads(json.dumps(made[0])) and len(calls) == 1
    assert made[0]["device"] == "cpu" and made[0]["torch"] == provenance_module.version("torch")
    assert len(json.dumps(made[0])) < 300


def test_a_gpus_arithmetic_is_recorded_even_where_torch_refuses_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    made = stamp("cuda:1")
    assert (made["device"], made["device_name"]) == ("cuda:1", "GPU of cuda:1")
    assert made["tf32_matmul"] is torch.backends.cuda.matmul.allow_tf32 and made["matmul_precision"] == "highest"
    assert made["tf32_cudnn"] is torch.backends.cudnn.allow_tf32 and made["cudnn_deterministic"] is True

    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert stamp("cuda")["matmul_precision"] == "mixed"


def test_row_says_of_which_code_its_artifacts_are() -> None:
    clean = {"git_commit": "a", "git_dirty": False, "torch": "2.15.0", "device": "cpu"}
    same = combine({"samples": clean, "scores": clean})
    assert same == {**clean, "stages": {}}
    mixed = combine({"samples": {**clean, "git_dirty": True}, "scores": {**clean, "git_commit": "b"}})
    assert mixed == {
        "git_commit": None,
        "git_dirty": True,
        "torch": "2.15.0",
        "device": "cpu",
        "stages": {
            "samples": {"git_commit": "a", "git_dirty": True},
            "scores": {"git_commit": "b", "git_dirty": False},
        },
    }
    made = provenance("cpu", "float32", "abc", None, stamps={"samples": clean, "scores": {**clean, "device": "cuda"}})
    assert made["device"] is None and made["stages"] == {"samples": {"device": "cpu"}, "scores": {"device": "cuda"}}
    assert made["checkpoint_hash"] == "abc" and made["libraries"]["torch"]
