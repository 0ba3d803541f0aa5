"""Tables: rows that cannot be compared stand apart, rows that differ are told apart, seeds are averaged."""

from __future__ import annotations

import copy
import json
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dqbench import tables
from dqbench.comparison import differences, label, settings, spell, with_baselines
from dqbench.results import Row, encode
from dqbench.tables import grouped, markdown, merged

CONFIG = {
    "model": {"name": "m", "path": "zoo:m", "data": "d", "dtype": "float32", "units": ["a"], "inputs": {"sample": [8]}},
    "method": {"name": "rtn", "version": 1, "skip": [], "recon": {"iters": 600}},
    "bits": {"weight": 4, "act": 8, "attention": 8},
    "recon": {"iters": 600},
    "calib": {"samples": 64},
    "sampler": {"scheduler": "DDIMScheduler", "steps": 50, "eta": 0.0, "num_samples": 1024, "kwargs": {}},
    "metrics": {"version": 1, "weights": "w", "statistics": {"frechet": {"bootstrap": 10}}},
    "seed": 0,
}
HASHES = {"checkpoint_hash": "c" * 64, "reference_hash": "r" * 12}


def row(value: float = 1.0, provenance: dict[str, Any] | None = None, **changes: Any) -> Row:
    """A row whose config departs from CONFIG at dotted keys, written with __ for dots; null removes nothing."""
    config = copy.deepcopy(CONFIG)
    for key, new in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = new
    interval = {"value": value, "low": value - 1, "high": value + 1}
    metric = {**interval, "n": 1024, "extractor": "e", "protocol": "p", "higher_is_better": False}
    cost = {"bops": 1e9, "size_bytes": 1000, "bits_per_weight": 4.1, "bits_per_act": 8.25, "convention": "c"}
    made = {**HASHES, **(provenance or {})}
    run_id = tables.digest([config, made])
    return Row(run_id, config, {"fd": metric}, {"fd": metric}, {}, cost, {}, made)


def body(table: str, heading: str = "") -> list[list[str]]:
    """The lines of a Markdown table, header first, without its rule; the first table or that under a heading."""
    text = table.split(f"## {heading}")[1] if heading else table.split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [lines[0], *lines[2:]]


INCOMPARABLE = [
    {"sampler__eta": 1.0},
    {"sampler__spacing": "trailing"},
    {"sampler__guidance": 3.0},
    {"sampler__kwargs": {"solver_order": 3}},
    {"sampler__num_samples": 2048},
    {"model__dtype": "float16"},
    {"model__data": "other", "provenance": {"reference_hash": "s" * 12}},
    {"model__path": "other", "provenance": {"checkpoint_hash": "d" * 64}},
    {"metrics__version": 2},
    {"metrics__statistics__frechet__bootstrap": 20},
]


@pytest.mark.parametrize("changes", INCOMPARABLE, ids=lambda changes: next(iter(changes)))
def test_rows_that_cannot_be_compared_stand_in_tables_of_their_own(changes: dict[str, Any]) -> None:
    groups = grouped([row(), row(**changes), row(seed=1), row(**changes, seed=1)])
    assert [len(members) for members in groups.values()] == [2, 2]
    special = tables.settings_apart([members[0] for members in groups.values()])
    titles = [markdown(members, told).splitlines()[0] for members, told in zip(groups.values(), special, strict=True)]
    assert len(set(titles)) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recon__iters": 20000}, "recon.iters=20000"),
        ({"recon__iters": 20000, "method__recon__iters": 20000}, "recon.iters=20000"),
        ({"method__vsc": False}, "method.vsc=false"),
        ({"method__version": 2}, "method.version=2"),
        ({"method__skip": ["conv_in"]}, 'method.skip=["conv_in"]'),
        ({"bits__attention": 4}, "bits.attention=4"),
        ({"calib__samples": 128}, "calib.samples=128"),
        ({"model__units": ["b"]}, 'model.units=["b"]'),
        ({"model__path": "/moved"}, "model.path=/moved"),
        ({"method__base": {"name": "qdiffusion", "version": 1}}, "rtn on qdiffusion"),
    ],
)
def test_what_differs_is_spelled_out(changes: dict[str, Any], told: str) -> None:
    rows = [row(), row(seed=1), row(seed=2), row(**changes)]  # most rows are plain
    assert len(grouped(rows)) == 1
    lines = merged(rows)
    assert [len(line.rows) for line in lines] == [3, 1] and lines[0].told == {}
    header, plain, special = body(markdown(rows, {}))
    assert plain[:2] == ["rtn", "w4a8"] and told in special[: header.index("seed")]


def test_at_a_draw_both_sides_are_spelled_out_in_the_order_of_numbers() -> None:
    lines = merged([row(recon__iters=20000), row(recon__iters=600)])
    assert [spell(line.told) for line in lines] == ["recon.iters=600", "recon.iters=20000"]
    absent = differences([{"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2}], [0, 0, 0])
    assert absent == [{"b": "(absent)"}, {}, {}]
    assert differences([{"a": 1}, {"a": 2}], ["one", "another"]) == [{}, {}]


def test_costs_stand_right_and_a_row_without_one_has_a_dash() -> None:
    older = row()
    del older.cost["bits_per_act"]
    for found, act in ((row(), "8.25"), (older, "–")):
        header, line = body(markdown([found], {}))
        assert header[-5:] == ["BOPs", "size", "bits/weight", "bits/act", "run"]
        assert line[-5:-1] == ["1 G", "1 kB", "4.10", act]


def test_seeds_are_averaged_with_the_t_interval_and_listed() -> None:
    values, single = [1.0, 2.0, 6.0], row(9.0, method__name="ptq4dm")
    members = [row(value, seed=seed) for seed, value in enumerate(values)] + [single]
    table = markdown(members, {})
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem(values))
    _, ptq4dm, rtn = body(table)
    assert rtn[:4] == ["rtn", "w4a8", "0, 1, 2", f"3.000 [{low:.3f}, {high:.3f}]"]
    assert ptq4dm[2:4] == ["0", "9.000 [8.000, 10.000]"] and ptq4dm[-1] == single.run_id
    listed = body(table, "Each seed")[1:]
    assert [line[2:4] for line in listed] == [
        ["0", "1.000 [0.000, 2.000]"], ["1", "2.000 [1.000, 3.000]"], ["2", "6.000 [5.000, 7.000]"],
    ]  # fmt: skip
    assert [line[-1] for line in listed] == [each.run_id for each in members[:3]]


def test_full_precision_is_one_row_per_seed() -> None:
    fp32 = [row(seed=seed, method={"name": "fp32"}, bits__weight=bits) for bits in (8, 4) for seed in (0, 1)]
    first = merged([row(), *fp32])[0]
    assert first.left() == {"method": "fp32", "bits": "–", "settings": "", "seed": "0, 1"} and len(first.rows) == 2


def test_rows_of_uncommitted_code_are_marked_and_every_protocol_is_told() -> None:
    dirty = row(seed=1, provenance={"git_dirty": True})
    dirty.metrics["fd"]["protocol"] = "q"
    table = markdown([row(), dirty], {})
    assert body(table)[1][-1] == "2, below†"
    assert [line[-1].endswith("†") for line in body(table, "Each seed")[1:]] == [False, True]
    assert "- fd: n 1,024; e; p" in table and "- fd: n 1,024; e; q" in table


def test_settings_name_files_by_content_and_fall_back_to_paths() -> None:
    assert settings(row(model__path="/a")) == settings(row(model__path="/b"))
    unknown = {"provenance": {"checkpoint_hash": None}}
    assert settings(row(model__path="/a", **unknown)) != settings(row(model__path="/b", **unknown))
    assert settings(row(sampler__batch_size=1)) == settings(row())


def test_command_writes_the_same_tables_for_any_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("dqbench.rendering.presets.presets", list)  # papers' tables have tests of their own
    axes = product((0, 1), (0.0, 1.0), (64, 128))
    rows = [row(seed=seed, sampler__eta=eta, calib__samples=size) for seed, eta, size in axes]
    contents = []
    for attempt in range(2):
        random.Random(attempt).shuffle(rows)
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(encode(each)) + "\n" for each in rows))
        monkeypatch.setattr(sys, "argv", ["tables", f"results={folder}", f"json={folder / 'ids.json'}"])
        tables.main()
        contents.append({path.name: path.read_text() for path in (folder / "tables").iterdir()})
        assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == contents[-1].keys()
    assert contents[0] == contents[1] and len(contents[0]) == 5  # with the page, the claims and their CSV
    listed = json.loads((folder / "ids.json").read_text())
    assert sorted(name for ids in listed.values() for name in ids) == sorted(each.run_id for each in rows)


def test_work_grows_with_the_rows_not_with_their_square() -> None:
    def calls(count: int) -> int:
        rows = [row(seed=seed, calib__samples=size) for seed in range(4) for size in range(count // 4)]
        seen = 0

        def trace(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            seen += event == "call"

        sys.setprofile(trace)
        try:
            markdown(rows, {})
        finally:
            sys.setprofile(None)
        return seen

    assert calls(160) < 5 * calls(40)


def test_baselines_join_a_sweep_where_they_are_comparable():
    found = [row(method__name="ptqd"), row(method__name="tfmq")]
    fits = [row(method__name="rtn"), row(method__name="qdiffusion")]
    others = [row(method__name="rtn", **change) for change in ({"seed": 1}, {"bits__act": 4}, {"sampler__eta": 1.0})]
    joined = with_baselines(found, [*found, *fits, *others, row(method__name="ptq4dm")])
    assert joined[:4] == [*found, *fits]
    (full,) = joined[4:]
    assert label(full)["method"] == "fp32" and full.metrics == found[0].reference and full.run_id == ""
    own = row(method__name="fp32", bits__weight=8)  # has no bits to differ in
    assert with_baselines(found, [own]) == [*found, own]


def test_bits_that_change_over_the_steps_are_told_by_their_mean():
    mixed = row(method__mixed={"mode": "ranges", "ranges": []})
    mixed.cost["bits_per_act"] = 6.04
    assert label(mixed)["bits"] == "w4a~6.0"
    assert label(row(method__mixed={"mode": "none"}))["bits"] == "w4a8"
