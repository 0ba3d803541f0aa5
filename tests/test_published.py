"""Published numbers: all of them load, each says how far it is verified, and a damaged file is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqbench import published
from dqbench.errors import UserError
from dqbench.published import Table, load, papers

GOOD = """\
name: A
arxiv: '2400.00001'
venue: V
tables:
- table: Table 1
  caption: c
  model: m
  steps: 20
  eta: 0.0
  protocol: {n_samples: 50000}
  source: https://example.org
  rows:
  - {method: FP, w: 32, a: 32, values: {fid: 2.98}, verified: true, evidence: primary}
  - {method: X, w: 4, a: 8, values: {fid: 3.68}, verified: true, evidence: tertiary, source: s}
"""


def folder(tmp_path: Path, text: str) -> Path:
    (tmp_path / "p.yaml").write_text(text)
    return tmp_path


def table(paper: str, name: str, **keys: object) -> Table:
    return next(t for t in load(paper).tables if t.table == name and all(getattr(t, k) == v for k, v in keys.items()))


def test_every_paper_loads() -> None:
    tables = [each for name in papers() for each in load(name).tables]
    assert {"tfmq", "ptqd", "qdiffusion", "ptq4dm", "quartz", "quant_dllm", "svdquant"} <= set(papers())
    assert not {"metrics", "claims"} & set(papers())
    assert len(tables) == 173 and sum(len(each.rows) for each in tables) == 556
    assert sum(not row.verified for each in tables for row in each.rows) == 92


@pytest.mark.parametrize(
    ("paper", "name", "keys", "row", "values", "state"),
    [
        ("tfmq", "Table 2 (unconditional, LDM)", {"steps": 200, "eta": 1.0}, ("FP", 32, 32), (2.98, 7.09), "primary"),
        ("tfmq", "Table 2 (unconditional, LDM)", {"steps": 400}, ("TFMQ-DM", 4, 8), (4.14, 11.46), "primary"),
        ("binarydm", "Table 2", {"dataset": "FFHQ"}, ("Q-Diffusion", 4, 8), (11.45, 9.06), "secondary"),
        ("qdit", "Table (ImageNet 256)", {}, ("TFMQ-DM", 4, 8), (141.9, 56.01), "tertiary"),
        ("qdiffusion", "Table 1 (CIFAR-10)", {}, ("Q-Diffusion", 8, 8), (3.75, None), "unverified"),
    ],
)
def test_numbers_and_how_far_they_are_verified(paper, name, keys, row, values, state) -> None:
    found = next(r for r in table(paper, name, **keys).rows if (r.method, r.w, r.a) == row)
    assert (found.values["fid"], found.values.get("sfid")) == values and found.state == state


def test_conflicting_values_both_stand() -> None:
    rows = [r for r in table("svdquant", "README table (later version of paper Table 1)", model="FLUX.1-dev").rows]
    twice = [r.values["fid"] for r in rows if (r.method, r.w, r.a) == ("naive (RTN)", 4, 4)]
    assert twice == [20.2, 20.3]
    user, paper = (table("qdiffusion", name) for name in ("issue #41 (user re-run)", "Table 1 (CIFAR-10)"))
    assert user.rows[0].values["fid"] == 4.79 and any(r.values["fid"] == 4.93 for r in paper.rows)


def test_a_row_without_source_has_its_tables(tmp_path: Path) -> None:
    rows = load("p", folder(tmp_path, GOOD)).tables[0].rows
    assert [row.source for row in rows] == ["https://example.org", "s"]
    assert [row.full_precision for row in rows] == [True, False] and rows[1].bits == "w4a8"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("w: 4,", "w: '4',", "rows 2 (X w4 a8), w: Input should be a valid integer"),
        ("w: 4,", "w: true,", "rows 2 (X wTrue a8), w: Input should be a valid integer"),
        ("fid: 3.68", "fid: .nan", "rows 2 (X w4 a8), values, fid: Input should be a finite number"),
        ("fid: 3.68", "fid: -.inf", "rows 2 (X w4 a8), values, fid: Input should be a finite number"),
        ("fid: 3.68", "fid: '3.68'", "rows 2 (X w4 a8), values, fid: Input should be a valid number"),
        ("fid: 3.68", "fdi: 3.68", "row 2 (X w4a8): metric=fdi is unknown; allowed: fid, sfid"),
        ("{fid: 3.68}", "{}", "row 2 (X w4a8) has no values"),
        ("method: X", "mehtod: X", "rows 2 (w4 a8), method: Field required"),
        ("verified: true, evidence: tertiary", "verified: true, evidence: hearsay", "rows 2 (X w4 a8), evidence"),
        ("evidence: tertiary,", "evidence: tertiary, colour: red,", "rows 2 (X w4 a8), colour"),
        ("n_samples: 50000", "samples: 50000", "tables 1 (Table 1), protocol, samples"),
        ("steps: 20", "steps: 20.5", "tables 1 (Table 1), steps"),
        ("  caption: c\n", "", "tables 1 (Table 1), caption: Field required"),
        ("  caption: c\n", "  caption: c\n  caption: d\n", "caption stands twice"),
        ("w: 4, a: 8", "w: 4, w: 8", "w stands twice"),
        ("venue: V", "venue: [", "is no YAML"),
        ("venue: V", "venue: V\nyear: 2024", "year: Unexpected keyword"),
    ],
)
def test_what_is_not_sound_is_refused_with_file_and_row(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError) as error:
        load("p", folder(tmp_path, GOOD.replace(old, new, 1)))
    assert str(tmp_path / "p.yaml") in str(error.value) and told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    last = GOOD.splitlines()[-1] + "\n"
    with pytest.raises(UserError, match=r"row 3 \(X w4a8\) stands twice"):
        load("p", folder(tmp_path, GOOD + last))
    other = folder(tmp_path, GOOD + last.replace("3.68", "3.69"))
    assert len(load("p", other).tables[0].rows) == 3  # two values of one setting


def test_an_empty_file_and_an_unknown_paper(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="p.yaml"):
        load("p", folder(tmp_path, ""))
    with pytest.raises(UserError, match="paper=tfqm is unknown; allowed: .*tfmq"):
        load("tfqm")


def test_every_metric_is_used_and_has_a_label() -> None:
    used = {name for paper in papers() for each in load(paper).tables for row in each.rows for name in row.values}
    assert used == set(published.metrics())
