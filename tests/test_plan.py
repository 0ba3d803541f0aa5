"""The plan of a sweep: the artifacts that it names are those that the run then builds, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import dqbench
from dqbench.config import compose
from dqbench.identity import run_id
from dqbench.launching.table import sweep as cells_of
from dqbench.plan import clock, main, plan, summary

TINY = ["debug=tiny", "tracking=none", "metrics=none"]


def files(folder: Path) -> dict[Path, int]:
    """Every artifact with its bytes."""
    found = [path.parent for path in folder.glob("cache/*/*/manifest.json")]
    return {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list]:
    """Overrides of a sweep of which one cell has run since, and the plan of before."""
    results = tmp_path_factory.mktemp("results") / "own"
    sweep = [*TINY, f"paths.results={results}", "method=fp32,ptqd", "bits=w4a8"]
    before = plan(sweep)
    assert not results.exists()
    dqbench.run([part.replace("fp32,ptqd", "ptqd") for part in sweep])
    return sweep, before


def test_the_artifacts_of_a_plan_are_those_that_are_built(ran):
    sweep, (full, own) = ran
    built = files(Path(sweep[3].removeprefix("paths.results=")))
    scored = {path for path in built if path.parent.name in ("scores", "features")}
    assert set(own.artifacts) == set(built) - scored and set(full.artifacts) < set(own.artifacts)
    for path, estimate in own.artifacts.items():
        if path.parent.name in ("trajectory", "calibration", "quantized", "samples"):
            overhead = 4_000 + 0.35 * estimate  # manifest, array headers, parameters of the quantizers
            assert estimate <= built[path] < estimate + overhead, path


def test_what_is_there_is_not_counted_again(ran):
    sweep, before = ran
    full, own = plan(sweep)
    assert [cell.state for cell in (*before, full, own)] == ["to run", "to run", "to run", "done"]
    assert own.artifacts == {} and own.seconds == 0 and full.seconds is None
    lines = "\n".join(summary([full, own], 10**9))
    assert "2 cells: 1 done, 1 to run\n" in lines and "sample sets: 1 for 1 uses, 1 there already" in lines
    assert "about 0 MB more" in lines and "time of 1 cells: no row" in lines
    (again,) = plan([*sweep, "method=ptqd", "seed=1"])[-1:]
    row = json.loads(next(Path(sweep[3].removeprefix("paths.results=")).glob("runs/*/row.json")).read_text())["timing"]
    took = row["calibrate_s"] + row["quantize_s"] + 2 * row["generate_s"] + row["score_s"]
    assert again.state == "to run" and again.seconds == pytest.approx(took)
    (forced,) = plan([*sweep, "method=ptqd", "runtime.force=true"])[-1:]
    assert forced.state == "has a row" and forced.seconds == pytest.approx(row["score_s"]), "all stages are there"


def test_cells_of_a_preset_come_in_its_order_and_operations_from_the_bill():
    sweep = ["+sweeps=digits", "method=fp32,rtn", "bits=w8a8,w4a8"]
    cells = plan([*sweep, "paths.results=/nowhere"])
    assert [cell.run_id for cell in cells] == list(dict.fromkeys(run_id(compose(own)) for own in cells_of(sweep)))
    assert [round(cell.bops / cells[0].bops, 3) for cell in cells] == [1, 1, 0.062, 0.031]


def test_a_checkpoint_that_is_not_here_blocks_a_cell_and_is_not_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    target = tmp_path / "plan.json"
    arguments = ["model=ddpm_cifar10", "method=rtn", "metrics=none", f"json={target}"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    main()
    (cell,) = json.loads(target.read_text())
    assert cell["state"] == "blocked" and "google/ddpm-cifar10-32" in cell["reason"] and cell["bops"] > 1e12 / 8
    told = capsys.readouterr().out
    assert "cannot start here: model ddpm_cifar10" in told and "without 1 cells that cannot start here" in told


@pytest.mark.parametrize(
    ("argument", "message"), [("+sweeps=digit", "did you mean digits"), ("sampler.steps=0", "sampler.steps=0")]
)
def test_bad_input_is_one_line(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "-m", argument])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_durations_are_spelled():
    assert [clock(value) for value in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]
