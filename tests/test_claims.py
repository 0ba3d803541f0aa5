"""Claims: every verdict on rows made for it, pairs by seed, mistakes in the book, the shipped book, the page."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from dqbench.claims import __main__, book
from dqbench.claims.book import Claim, Comparison, comparisons, read, series
from dqbench.claims.page import markdown, paths, records, write
from dqbench.claims.section import html
from dqbench.claims.sheets import missing
from dqbench.claims.verdicts import holm, judge
from dqbench.config import data_root, expand
from dqbench.errors import UserError
from dqbench.results import Row, encode, rows

CLAIM = {
    "id": "cnc",
    "paper": "ptqd",
    "source": "Table 6",
    "statement": "CNC helps",
    "cell": ["method=ptqd", "bits=w4a4,w4a8"],
    "treatment": ["method/ablation=cnc"],
    "control": ["method/ablation=none"],
    "about": ["method.cnc"],
    "metrics": ["fd"],
}
SIDES = {True: {"method": {"name": "a"}}, False: {"method": {"name": "b"}}}


def row(treated: bool, seed: int, fd: float, psnr: float = 0.0, **cost: float) -> Row:
    """A row of one of two cells; fd is better low, psnr high."""
    metrics = {"fd": {"value": fd, "higher_is_better": False}}
    paired = {"psnr": {"value": psnr, "higher_is_better": True}}
    config = SIDES[treated] | {"seed": seed}
    return Row(f"{treated}{seed}", config, metrics, {}, paired, {"bops": 100.0} | cost, {}, {"git_dirty": False})


def found(treatment: Sequence[float], control: Sequence[float]) -> list[Row]:
    """Rows of both cells by seed, whose fd are these and whose psnr are their negatives."""
    sides = ((True, treatment), (False, control))
    return [row(treated, seed, fd, -fd) for treated, side in sides for seed, fd in enumerate(side)]


def compare(*metrics: str, seeds: int = 3) -> Comparison:
    claim = Claim(**CLAIM | {"metrics": list(metrics) or ["fd"], "seeds": seeds})
    return Comparison(claim, ["method=ptqd", "bits=w4a4"], "w4a4", series(SIDES[True]), series(SIDES[False]))


@pytest.mark.parametrize(
    ("treatment", "control", "verdict"),
    [
        ([1.0, 2.0, 3.1], [2.0, 3.0, 4.0], "shown"),
        ([2.0, 3.0, 4.0], [1.0, 2.0, 3.1], "contrary"),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.5], "not shown"),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], "not shown"),  # always the same: no variance to test against
        ([1.0, 2.0], [2.0, 3.1], "not run"),
        ([], [2.0, 3.0, 4.0], "not run"),
    ],
)
def test_verdicts_follow_the_direction_of_each_metric(
    treatment: list[float], control: list[float], verdict: str
) -> None:
    (result,) = judge([compare("psnr", "fd")], found(treatment, control))
    assert [effect.verdict for effect in result.effects] == [verdict, verdict]
    assert result.verdict == verdict


def test_the_first_metric_decides_and_p_is_one_sided() -> None:
    rng = np.random.default_rng(0)
    treatment, control = rng.normal(0.0, 1.0, (2, 5))
    treated = [row(True, seed, fd, fd) for seed, fd in enumerate(treatment)]
    (result,) = judge([compare("psnr", "fd")], [*treated, *(row(False, s, fd, fd) for s, fd in enumerate(control))])
    psnr, fd = result.effects
    differences = treatment - control
    low, high = stats.t.interval(0.95, 4, loc=differences.mean(), scale=stats.sem(differences))
    for effect in (psnr, fd):
        assert (effect.effect, effect.low, effect.high) == pytest.approx((differences.mean(), low, high))
    assert psnr.p == pytest.approx(stats.ttest_1samp(differences, 0, alternative="greater").pvalue)
    assert fd.p == pytest.approx(1 - psnr.p)
    assert result.verdict == psnr.verdict


def test_only_seeds_of_both_sides_count_whatever_their_order() -> None:
    treated = [row(True, seed, fd) for seed, fd in {7: 1.0, 0: 2.0, 5: 4.0, 3: 1e9}.items()]
    control = [row(False, seed, fd) for seed, fd in {5: 4.4, 0: 3.0, 9: -1e9, 7: 2.1}.items()]
    (result,) = judge([compare()], [*treated, *control])
    assert result.seeds == [0, 5, 7]
    assert result.effects[0].effect == pytest.approx(np.mean([-1.0, -0.4, -1.1]))
    (short,) = judge([compare(seeds=4)], [*treated, *control])
    assert short.verdict == "not run" and "3 of 4" in markdown([short])


def test_a_metric_that_rows_lack_is_named_with_the_claim() -> None:
    with pytest.raises(UserError, match=r"claim cnc: run True0 has no metric fid; there: fd, psnr"):
        judge([compare("fid")], found([1.0, 2.0, 3.1], [2.0, 3.0, 4.0]))


def test_holm_is_the_textbooks_and_leaves_out_what_was_not_tested() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    clear, weak = [1.0, 2.0, 3.0001], [1.0, 2.0, 3.65]
    results = judge([compare(), compare()], found(clear, [2.0, 3.0, 4.0]))
    assert all(result.effects[0].p_holm == pytest.approx(4 * result.effects[0].p) for result in results)
    assert "2 tests" in markdown(results) and "‡" in markdown(results).split("## ")[1]
    (alone,) = judge([compare()], found(weak, [2.0, 3.0, 4.0]))
    assert alone.verdict == "shown" and "**shown** |" in markdown([alone])


BAD = {
    "unknown key": ({"metric": ["fd"]}, "metric is unknown"),
    "missing key": ({"source": None}, "source"),
    "wrong type": ({"seeds": "many"}, "seeds=many has the wrong type"),
    "no metric": ({"metrics": []}, "metrics is empty"),
    "one seed": ({"seeds": 1}, "seeds=1 is out of range"),
    "seed": ({"cell": ["seed=1"]}, "seed=1 has no meaning"),
    "paper": ({"paper": "nobody"}, "paper=nobody is unknown; allowed: ptqd"),
    "no such choice": ({"control": ["method/ablation=nothing"]}, "method/ablation=nothing is unknown"),
    "no such key": ({"control": ["method.cncc=false"]}, "cncc"),
    "no override": ({"control": ["method/ablation=null"]}, "Config group override must be"),
    "value": ({"cell": ["method=ptqd", "bits.act=9"]}, "bits.act=9 is not supported"),
    "same cell": ({"control": ["method/ablation=cnc"]}, "treatment and control are the same cell"),
    "name alone": ({"control": ["method/ablation=cnc", "method.name=x"]}, "treatment and control are the same cell"),
    "too much": ({"control": ["method/ablation=none", "sampler.eta=0.5"]}, "differ in sampler.eta, too"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_mistakes_in_the_book_name_the_claim(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entry = {key: value for key, value in (CLAIM | change).items() if value is not None}
    with pytest.raises(UserError, match=r"^claim cnc") as caught:
        comparisons(read(write_book(tmp_path, [entry]))[1])
    assert message in str(caught.value)


def test_mistakes_above_the_claims(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="claim cnc is there twice"):
        read(write_book(tmp_path, [CLAIM, CLAIM]))
    with pytest.raises(UserError, match="claims.yaml: paper is unknown"):
        read(write_book(tmp_path, [CLAIM], paper="ptqd"))


def write_book(folder: Path, claims: list[dict[str, Any]], **more: Any) -> Path:
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump({"seeds": 3, "papers": {"ptqd": "PTQD"}, "claims": claims, **more}))
    return path


def test_differences_that_vary_by_rounding_alone_do_not_vary() -> None:
    for treatment, control in (([0.3, 0.4, 0.9], [0.2, 0.3, 0.8]), ([0.991, 0.985, 0.972], [0.981, 0.975, 0.962])):
        (result,) = judge([compare()], found(treatment, control))
        assert (result.verdict, result.effects[0].p) == ("not shown", None)


@pytest.fixture(scope="module")
def shipped() -> list[Comparison]:
    """The shipped book, composed: that alone checks that sides differ, and in nothing but what the claim is about."""
    return book.shipped()


def test_shipped_claims_are_told_apart_and_speak_of_parts(shipped: list[Comparison]) -> None:
    assert len({(each.treatment, each.control) for each in shipped}) == len(shipped)
    for claim in {each.claim.id: each.claim for each in shipped}.values():
        sides = [text for text in (*claim.treatment, *claim.control) if text.startswith("method=")]
        assert ("method.*" in claim.about) == (len(sides) == 2), claim.id
        assert len([each for each in shipped if each.claim is claim]) == len(list(expand(claim.cell)))


def test_shipped_claims_find_published_rows_by_what_they_are(shipped: list[Comparison]) -> None:
    """The rows that a claim compares, chosen here by their method's name and bits, without composing anything."""
    published = rows(data_root() / "results")
    results = {(result.comparison.claim.id, result.comparison.case): result for result in judge(shipped, published)}
    chosen = {
        ("ptqd_cnc", "w4a8", "psnr"): ("ptqd_cnc", "ptqd_none"),
        ("tfmq_fsc", "w4a4", "noise_error"): ("tfmq_fsc", "tfmq_base"),
        ("dllm_abmp", "w2a32", "exact"): ("dllm_full", "dllm_no_abmp"),
    }
    for (name, case, metric), sides in chosen.items():
        values = [
            {
                each.config["seed"]: (each.metrics | each.paired)[metric]["value"]
                for each in published
                if each.config["method"]["name"] == method and case == "w{weight}a{act}".format(**each.config["bits"])
            }
            for method in sides
        ]
        differences = [values[0][seed] - values[1][seed] for seed in (0, 1, 2)]
        (effect,) = (each for each in results[name, case].effects if each.metric == metric)
        assert effect.effect == pytest.approx(np.mean(differences))
        assert (effect.high - effect.low) / 2 == pytest.approx(stats.sem(differences) * stats.t.ppf(0.975, 2))


def test_what_is_not_run_comes_as_commands(shipped: list[Comparison]) -> None:
    lines = [shlex.split(line) for line in missing(judge(shipped, []))]
    assert all(line[:4] == ["python", "-m", "dqbench", "-m"] and line[-1] == "seed=0,1,2" for line in lines)
    wanted = {each for comparison in shipped for each in (comparison.treatment, comparison.control)}
    claims = [Claim(**CLAIM | {"id": str(i), "cell": line[4:-1], "seeds": 3}) for i, line in enumerate(lines)]
    composed = {series(book._identity(tuple(cell))) for claim in claims[:4] for cell in expand(claim.cell)}
    assert composed <= wanted and len(composed) > 4


def test_the_command_writes_the_page_and_prints_commands_alone(
    tmp_path: Path, shipped: list[Comparison], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = [*found([1.0, 2.0, 3.1], [2.0, 3.0, 4.0])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(encode(each)) + "\n" for each in made))
    one = Comparison(shipped[0].claim, [], "w8a8", series(SIDES[True]), series(SIDES[False]))
    calls = []
    monkeypatch.setattr(book, "_composed", lambda state: calls.append(1) or [one])
    monkeypatch.setattr(shipped[0].claim, "metrics", ["fd"])
    monkeypatch.setattr(book, "read", lambda: ({one.claim.paper: "P<sub>"}, [one.claim]))
    monkeypatch.setattr(sys, "argv", ["claims", f"results={tmp_path}", f"json={tmp_path / 'out.json'}"])
    for _ in range(2):  # the second time from what the first kept
        __main__.main()
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("1 shown, 0 not shown, 0 contrary, 0 not run") == 2 and len(calls) == 1
    page, flat = paths(tmp_path)
    assert "| w8a8 | 0, 1, 2 | " in page.read_text() and list(csv.DictReader(flat.open()))[0]["verdict"] == "shown"
    assert json.loads((tmp_path / "out.json").read_text())[0]["verdict"] == "shown"
    (tmp_path / "cache" / "claims.json").write_text("{")
    write(tmp_path)
    assert len(calls) == 2


def test_html_is_well_formed_and_carries_verdicts(shipped: list[Comparison]) -> None:
    results = judge(shipped, rows(data_root() / "results"))
    text = html(results)
    open_tags, classes, spans = [], set(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            open_tags.append(tag)
            given = dict(attributes)
            classes.add(given.get("class"))
            spans.append(int(given.get("rowspan", 1)) if given.get("scope") == "row" else 0)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(text)
    assert not open_tags and {"pill shown", "pill contrary", "pill not-shown", "scroll"} <= classes
    papers = len({result.comparison.claim.paper for result in results})
    assert sum(spans) == papers + len(results)  # a line for each paper, then one for each comparison


def test_costs_are_told_where_they_differ() -> None:
    sides = [[row(True, seed, seed * 1.0, bops=102.4) for seed in range(3)], [row(False, s, 9.0) for s in range(3)]]
    (result,) = judge([compare()], [*sides[0], *sides[1]])
    assert "| BOPs +2.4 % |" in markdown([result])
    assert records([result])[0]["treatment_mean"] == 1.0


def test_claims_need_no_torch(tmp_path: Path) -> None:
    path = write_book(tmp_path, [CLAIM])
    code = f"""
import sys
from pathlib import Path
from dqbench.claims import book, page, verdicts
verdicts.judge(book.comparisons(book.read(Path({str(path)!r}))[1]), [])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
