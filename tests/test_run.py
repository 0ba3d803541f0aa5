"""What a cell's stages depend on, what it refuses before anything is loaded, and the row it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dqbench
from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.identity import identity, run_id
from dqbench.launching.checks import check
from dqbench.launching.explain import explain
from dqbench.results import Row
from dqbench.run import Cell

TINY = ["debug=tiny", "tracking=none", "metrics=none"]


def cell(folder: Path, *overrides: str) -> Cell:
    return Cell(compose([*TINY, f"paths.results={folder}", *overrides]))


def run(folder: Path, *overrides: str) -> Row:
    return dqbench.run([*TINY, f"paths.results={folder}", *overrides])


def test_prompts_and_real_images_enter_keys_by_content(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    own = cell(tmp_path)
    own.model.prompts = str(prompts)
    before = own.origin["model"]["prompts"]
    prompts.write_text("a dog\n")
    assert cell(tmp_path).origin["model"]["prompts"] != before
    again = cell(tmp_path)
    again.model.prompts = str(prompts)
    assert again.origin["model"]["prompts"] != before

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"one")
    hashes = []
    for content in (b"one", b"two"):
        (tmp_path / "images" / "0.png").write_bytes(content)
        hashes.append(cell(tmp_path, "calib=image", f"model.data={tmp_path / 'images'}").data_hash)
    assert None not in hashes and hashes[0] != hashes[1]
    assert cell(tmp_path, f"model.data={tmp_path / 'images'}").data_hash is None  # nothing of it calibrates


def test_how_fast_and_where_files_lie_are_no_part_of_a_run():
    weights = "metrics.weights=/here/classifier"
    ids = [
        run_id(compose(["sampler.batch_size=8", weights])),
        run_id(compose(["metrics.batch_size=8", "metrics.weights=/there/classifier"])),
    ]
    assert ids[0] == ids[1] != run_id(compose(["calib.batch_size=8", weights]))  # running ranges depend on it


def test_a_base_is_named_once_and_only_where_it_means_something():
    cfg = compose(["method=ptqd", "base=rtn"])
    assert identity(cfg)["method"]["base"]["name"] == "rtn" and "base" not in identity(cfg)
    with pytest.raises(UserError, match="base has no meaning for method=rtn"):
        check(compose(["method=rtn", "base=qdiffusion"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calib.steps=2", "calib.samples=10", "calib.chains=4"], "more than 2 steps x calib.chains=4"),
        (["calib=ndtc", "calib.samples=null"], "calib.samples=null has no meaning"),
        (["method=ptqd", "sampler=dpmpp20", "calib.steps=4"], "method.vsc=true has a formula for DDIM and DDPM alone"),
        (["method=ptqd", "base=ptqd"], "base"),
        (["method=rtn", "method.act.estimator=mse"], "over=all"),
        (["method=ptqd", "base=ptq4dm", "base.quantize_mu=true"], "no formula for the steps of base=ptq4dm"),
        (["method=ptqd", "base=tfmq", "method/mixed=half"], "no meaning with the per-step ranges of base=tfmq"),
        (["method=ptqd", "base=rtn", "method/mixed=half", "calib.steps=1", "calib.samples=4"], "leaves 1 of 2 groups"),
        (["method=ptqd", "base=rtn", "method/mixed=rule", "calib=ndtc", "calib.samples=4"], "not calib.policy=normal"),
        (["method=tfmq", "calib.steps=2"], "calib.steps=2 leaves 2 of 4 groups of the 4 steps without rows"),
        (["method=ptq4dm", "method.quantize_mu=true", "sampler=plms50", "sampler.guidance=1", "calib.steps=4"], "mu"),
    ],
)
def test_what_would_fail_late_or_do_nothing_is_refused_early(overrides, message, tmp_path):
    with pytest.raises(Exception, match=message) as refused:
        cell(tmp_path, *overrides)
    assert len(explain(refused.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_corrected_method_shares_its_base(tmp_path):
    alone = cell(tmp_path, "method=rtn")
    base = alone.quantize(alone.calibrate())
    corrected = cell(tmp_path, "method=ptqd", "base=rtn", "method.chains=8")
    found = corrected.quantize(corrected.calibrate())
    assert found.base == base.base and found.statistics is not None and found.key != base.key
    switched = cell(tmp_path, "method=ptqd", "base=rtn", "method.chains=8", "method.cnc=false")
    other = switched.quantize(switched.calibrate())
    assert other.statistics == found.statistics and other.key != found.key
    images = [one.generate(one.quantize(one.calibrate())).folder for one in (alone, corrected, switched)]
    assert len(set(images)) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_ends_in_a_row(dtype, tmp_path):
    row = run(tmp_path, "method=qdiffusion", f"model.dtype={dtype}", "sampler.num_samples=4")
    assert 0 < row.paired["noise_error"]["value"] < 1 and row.provenance["dtype"] == dtype


def test_a_row_says_what_was_made_when(tmp_path, monkeypatch):
    cell(tmp_path, "method=rtn").calibrate()
    for manifest in (tmp_path / "cache").glob("*/*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["stamp"]["git_commit"] = "earlier"
        manifest.write_text(json.dumps(content))
    made = run(tmp_path, "method=rtn").provenance
    assert made["git_commit"] is None and made["stages"]["calibration"]["git_commit"] == "earlier"
    assert made["stages"]["quantized"]["git_commit"] != "earlier"
