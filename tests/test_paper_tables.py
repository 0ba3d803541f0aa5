"""Papers' tables: every number is that of the rows and of the published YAML, and nothing passes for what it is not."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy import stats

from dqbench import tables
from dqbench.config import compose, data_root
from dqbench.errors import UserError
from dqbench.identity import identity, run_id
from dqbench.published import load
from dqbench.rendering.cells import RunIds, axis, run_ids
from dqbench.rendering.latex import escape
from dqbench.rendering.page import Section, render_html
from dqbench.rendering.presets import check_closed, paper_presets, read_axes
from dqbench.results import Row, encode
from dqbench.studies import iso_bits

PRESET = "tfmq_table2"
FULL = ("setting=bedrooms200", "scale=full")


@functools.cache
def config(*overrides: str) -> Any:
    return compose([f"+sweeps={PRESET}", *overrides])


def metric(value: float, n: int = 1024, protocol: str = "frechet; torch-fidelity 0.4.0, reference r") -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.25, "high": value + 0.5}
    return {**interval, "n": n, "extractor": "e", "protocol": protocol, "higher_is_better": False}


def row(value: float, *overrides: str, names: tuple[str, ...] = ("fd_digits", "sfd_digits"), n: int = 1024) -> Row:
    """A row of a cell of the preset; full precision has 1, its metrics are `value` and `value + 10`."""
    cfg = config(*overrides)
    quantized = "method=fp32" not in overrides
    metrics = {name: metric(value + 10 * i, n) for i, name in enumerate(names)}
    reference = {name: metric(1 + 10 * i, n) for i, name in enumerate(names)}
    difference = {name: {"value": value - 1, "low": value - 1.125, "high": value - 0.5} for name in names}
    paired = {"psnr": metric(30.0)} if quantized else {}
    return Row(
        *(run_id(cfg), identity(cfg), metrics, reference, paired, {}, {}, {}),
        difference=difference if quantized else {},
    )


def seeds(values: list[float], *overrides: str) -> list[Row]:
    return [row(value, "setting=digits50", *overrides, f"seed={seed}") for seed, value in enumerate(values)]


def render(folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch, *presets: str) -> Path:
    """results/tables after `python -m dqbench.tables`, of some presets alone."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(encode(each)) + "\n" for each in rows))
    monkeypatch.setattr("dqbench.rendering.presets.presets", lambda: list(presets or (PRESET,)))
    monkeypatch.setattr(sys, "argv", ["tables", f"results={folder}"])
    tables.main()
    return folder / "tables"


def entries(folder: Path, preset: str = PRESET, **wanted: str) -> list[dict[str, str]]:
    lines = csv.DictReader(io.StringIO((folder / f"{preset}.csv").read_text()))
    return [line for line in lines if all(line[key] == value for key, value in wanted.items())]


def entry(folder: Path, method: str, w: int, a: int, **wanted: str) -> dict[str, str]:
    """The line of LSUN bedrooms' FID."""
    keys = {"method": method, "w": str(w), "a": str(a), "metric": "fid", "model": "LDM-4 lsun_beds256", **wanted}
    (found,) = entries(folder, **keys)
    return found


def numbers(line: dict[str, str], *names: str) -> list[float]:
    return [float(line[name]) for name in names]


def some() -> list[Row]:
    return [*seeds([2.0, 3.0, 7.0], "method=tfmq", "bits=w4a8"), *seeds([5.0], "method=ptq4dm", "bits=w4a8")]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return render(tmp_path_factory.mktemp("mini"), some(), patch)


def test_three_seeds_are_a_mean_with_its_t_interval(mini: Path) -> None:
    found = entry(mini, "TFMQ-DM", 4, 8)
    assert numbers(found, "published", "published_fp", "published_delta") == pytest.approx([3.68, 2.98, 0.70])
    low, high = stats.t.interval(0.95, 2, loc=4, scale=stats.sem([2.0, 3.0, 7.0]))
    assert numbers(found, "mini_value", "mini_low", "mini_high") == pytest.approx([4, low, high])
    assert numbers(found, "mini_delta", "mini_delta_low", "mini_delta_high") == pytest.approx([3, low - 1, high - 1])
    assert (found["status"], found["mini_metric"], found["mini_n"], found["mini_seeds"]) == (
        *("miniature", "fd_digits"),
        *("1024", "3"),
    )
    expected = [run_id(config("setting=digits50", "method=tfmq", "bits=w4a8", f"seed={seed}")) for seed in range(3)]
    assert found["mini_run_ids"].split() == expected
    assert "4.000 [-2.572, 10.572]" in (mini / f"{PRESET}.md").read_text().replace("\\", "")


def test_one_seed_has_its_metrics_own_interval_and_full_precision_is_what_rows_hold_of_it(mini: Path) -> None:
    found = entry(mini, "PTQ4DM", 4, 8)
    assert numbers(found, "mini_value", "mini_low", "mini_high") == [5, 4.75, 5.5]
    assert numbers(found, "mini_delta", "mini_delta_low", "mini_delta_high") == [4, 3.875, 4.5]
    full = entry(mini, "FP", 32, 32)
    assert numbers(full, "published", "mini_value", "mini_seeds") == [2.98, 1, 1] and full["mini_delta"] == ""
    assert full["published_delta"] == full["mini_run_ids"] == ""  # it has no run of its own
    assert (full["mini_low"], full["mini_high"]) == ("0.75", "1.5")  # of three seeds with the very same value


def test_full_precision_names_all_of_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [row(value, "setting=digits50", "method=fp32", f"seed={i}") for i, value in enumerate((1.0, 2.0, 3.0))]
    found = entry(render(tmp_path, [*own, *seeds([5.0], "method=tfmq", "bits=w4a8")], monkeypatch), "FP", 32, 32)
    assert found["mini_run_ids"].split() == [each.run_id for each in own] and float(found["mini_value"]) == 2


def test_what_has_no_row_is_published_alone(mini: Path) -> None:
    found = entry(mini, "TFMQ-DM", 8, 8)
    assert found["status"] == "not run" and float(found["published"]) == 3.14
    assert {value for key, value in found.items() if key.startswith(("mini_", "full_"))} == {""}
    published = [r for t in load("tfmq").tables if t.table.startswith("Table 2") for r in t.rows]
    assert len(entries(mini, metric="fid")) == len(published) == 52  # every row is there, whatever has run


def test_columns_of_a_published_model_are_kept_apart(mini: Path) -> None:
    found = entries(mini, method="TFMQ-DM", w="4", a="8", metric="fid")
    assert [float(line["published"]) for line in found] == [3.68, 4.14, 8.76, 9.97]
    assert [float(line["published_fp"]) for line in found] == [2.98, 4.12, 8.74, 9.36]


def test_a_miniature_never_stands_in_a_column_called_fid(mini: Path) -> None:
    header = next(line for line in (mini / f"{PRESET}.md").read_text().splitlines() if line.startswith("| method"))
    columns = [name.strip().replace("\\", "") for name in header.strip("|").split("|")]
    assert [name for name in columns if "miniature" in name] == ["fd_digits ↓ miniature", "sfd_digits ↓ miniature"]
    assert all("published" in name or "Δ" in name for name in columns if name.lower().startswith(("fid", "sfid")))
    tex, page = (mini / f"{PRESET}.tex").read_text(), (mini / "index.html").read_text()
    assert r"\multicolumn{2}{c}{fd\_digits $\downarrow$}" in tex
    assert re.search(r'<th colspan="2" class="group" scope="colgroup">fd_digits ↓</th>', page)


def full(n: int = 50000, *overrides: str) -> Row:
    made = row(3.5, *FULL, "method=tfmq", "bits=w4a8", *overrides, names=("fid", "sfid"), n=n)
    assert made.config["sampler"]["steps"] == 200
    return made


def test_full_scale_is_reproduced_under_the_papers_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entry(render(tmp_path, [full()], monkeypatch), "TFMQ-DM", 4, 8)
    assert (found["status"], found["full_metric"], found["full_n"], found["mini_value"]) == (
        *("reproduced", "fid"),
        *("50000", ""),
    )
    assert numbers(found, "full_value", "full_delta", "published") == [3.5, 2.5, 3.68]


def test_another_protocol_is_no_reproduction_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = render(tmp_path, [full(n=10000)], monkeypatch)
    found = entry(folder, "TFMQ-DM", 4, 8)
    assert found["status"] == "full scale, other protocol"
    assert "samples: 50,000 → 10,000" in found["full_differences"]
    assert "samples: 50,000 → 10,000" in (folder / f"{PRESET}.md").read_text()


def test_differences_are_those_of_config_and_metric(mini: Path) -> None:
    texts = entry(mini, "TFMQ-DM", 4, 8)["mini_differences"]
    assert "measure of fid" in texts and "measure of sfid" not in texts
    assert "measure of fid" not in entry(mini, "TFMQ-DM", 4, 8, metric="sfid")["mini_differences"]
    for told in ("model: LDM-4 lsun_beds256, LSUN-Bedrooms, 256x256 → digits_ddpm", "steps: 200 → 50", "eta: 1 → 0"):
        assert told in texts
    assert "fd_digits by e; frechet; torch-fidelity 0.4.0, reference r" in texts and "sampler" not in texts
    churches = entry(mini, "TFMQ-DM", 4, 8, model="LDM-8 lsun_churches256")["mini_differences"]
    assert "steps: 400 → 50" in churches and "eta" not in churches


def test_unverified_numbers_are_marked_and_only_they(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = render(tmp_path, [full()], monkeypatch, "qdiffusion_table1")
    text = (folder / "qdiffusion_table1.md").read_text()
    paper = [t for t in load("qdiffusion").tables if t.table == "Table 1 (CIFAR-10)"][0]
    body = [line.split(" | ") for line in text.split("## ")[1].splitlines() if re.match(r"\| [A-Z]", line)]
    assert len(body) == len(paper.rows) == 15
    for cells, published in zip(body, paper.rows, strict=True):
        mark = {"tertiary": "○", "secondary": "◐", "unverified": "?"}[published.state]
        assert cells[4] == f"{published.values['fid']:.2f} {mark}"
    assert sum(published.state == "unverified" for published in paper.rows) == 13
    changes = [cells[5].split()[-1] for cells in body if cells[5] != "–"]
    assert set(changes) == {"?"}  # the full precision that they are held against is itself unverified
    assert text.count("? not verified") == 1  # the legend


def test_run_ids_put_together_are_those_of_composed_cells() -> None:
    for preset, scale, method, bits in (
        ("tfmq_table2", "mini", "method=ptqd", "w8a8"),
        ("tfmq_table2", "full", "method=tfmq", "w4a8"),
        ("quant_dllm_table", "mini", "method=gptq", "w2a32"),
    ):
        axes = next(each.axes for each in paper_presets() if each.name == preset)
        swept = {key: axis(key, value) for key, value in getattr(axes, scale).items()}
        wanted = (*swept["setting"][:1], method)
        whole = [f"+sweeps={preset}", f"scale={scale}", *wanted, f"bits={bits}"]
        expected = [run_id(compose([*whole, seed])) for seed in swept["seed"]]
        assert run_ids(preset, scale, wanted, bits, swept) == expected


def test_a_method_that_leaves_an_axis_open_is_refused() -> None:
    (preset,) = (each for each in paper_presets() if each.name == "ptq4dm_table3")
    check_closed(preset.axes, Path("mine.yaml"))
    open_ = replace(preset.axes, methods=preset.axes.methods | {"NDTC (PTQ4DM)": "ptq4dm"})
    with pytest.raises(UserError, match=r"mine.yaml: table.methods: NDTC \(PTQ4DM\): ptq4dm leaves calib open"):
        check_closed(open_, Path("mine.yaml"))


def test_pages_are_the_same_bytes_from_a_cold_a_warm_and_a_damaged_cache(tmp_path: Path, monkeypatch: Any) -> None:
    mini = render(tmp_path, some(), monkeypatch)

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in mini.iterdir()}

    first, cache = contents(), mini.parent / "cache" / "run_ids.json"
    assert RunIds(cache).known
    for damage in (None, "{", '{"state": 1, "cells": 2}'):
        if damage:
            cache.write_text(damage)
        tables.main()
        assert contents() == first
    assert not [path for path in mini.rglob("*") if "tmp" in path.name]


class Reader(HTMLParser):
    """Tags that are open, links, ids."""

    void = {"meta", "link", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.ids: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.void else [tag]
        self.links += [(tag, key, value or "") for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.ids.update(value for key, value in attrs if key == "id" and value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.void else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_the_page_needs_nothing_beside_itself(mini: Path) -> None:
    page = (mini / "index.html").read_text()
    reader = read(page)
    for tag, _, value in reader.links:
        assert value.startswith("https://") if tag == "a" and value[0] != "#" else value.startswith(("#", "data:"))
    inside = {value[1:] for _, _, value in reader.links if value.startswith("#")}
    assert inside <= reader.ids.keys() and PRESET in inside
    assert max(reader.ids.values()) == 1 and len(page) < 3_000_000
    assert "<script" not in page and "@import" not in page and "url(http" not in page
    assert "<svg" in page and "currentColor" in page and "prefers-color-scheme: dark" in page


def test_a_section_of_claims_joins_the_page() -> None:
    page = render_html([Section("Claims & <verdicts>", "claims", "<table><tr><td>shown</td></tr></table>", "2 shown")])
    assert '<article id="claims">' in page and "<td>shown</td>" in page
    assert "Claims &amp; &lt;verdicts&gt;" in page and '<a href="#claims">' in page
    read(page)


def test_pictures_are_kept_when_the_run_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = seeds([5.0], "method=tfmq", "bits=w4a8")
    picture = tmp_path / "runs" / rows[0].run_id / "samples.png"
    picture.parent.mkdir(parents=True)
    Image.new("L", (1440, 240), 128).save(picture)
    folder = render(tmp_path, rows, monkeypatch)
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "samples of TFMQ-DM w4a8, miniature" in page
    with Image.open(folder / "samples" / f"{rows[0].run_id}.png") as kept:
        assert kept.size == (360, 60)
    picture.unlink()
    tables.main()
    assert (folder / "index.html").read_text() == page


TABULAR = re.compile(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", re.S)


def check_latex(text: str) -> int:
    """Assert what a LaTeX run would stumble over: braces, environments, math, cells of a line; the tables there are."""
    assert text.isascii()
    code = re.sub(r"(?m)^%.*\n", "", text)
    assert Counter(re.findall(r"\\begin\{(\w+)\}", code)) == Counter(re.findall(r"\\end\{(\w+)\}", code))
    plain = re.sub(r"\\[\\{}%#&$_]", "", code)
    depth = 0
    for sign in plain:
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0 and plain.count("$") % 2 == 0
    outside = re.sub(r"\$[^$]*\$", "", plain)
    assert not re.search(r"[#%_^~<>|\"]", outside)
    found = TABULAR.findall(code)
    for columns, body in found:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 2
        for line in lines:
            spans = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == len(columns)
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert "&" not in re.sub(r"\\&", "", TABULAR.sub("", code))
    return len(found)


def test_latex_is_well_formed(mini: Path) -> None:
    assert check_latex((mini / f"{PRESET}.tex").read_text()) == 4
    nasty = escape('100% of $x_i^2 & #1 {~} \\n <a> [b] "c" |d| Δ±×→≥–†')
    check_latex(nasty)
    with pytest.raises(AssertionError):
        check_latex("a_b")


def test_every_preset_with_published_numbers_can_be_read_and_names_what_exists() -> None:
    found = {preset.name: preset for preset in paper_presets()}
    assert {"tfmq_table2", "qdiffusion_table1", "ptq4dm_table5", "ptqd_main", "quant_dllm_table"} <= found.keys()
    assert all(preset.tables for preset in found.values())


def fails(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setattr(sys, "argv", ["tables", f"results={folder}"])
    with pytest.raises(SystemExit) as error:
        tables.main()
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and not (folder / "tables").exists()
    return line


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("tables: [", "tables: [Table 99, ", "table.tables=Table 99 is unknown; allowed: "),
        ("paper: tfmq", "paper: tfqm", "paper=tfqm is unknown; allowed: "),
        ("TFMQ-DM: tfmq", "TFMQDM: tfmq", "table.methods=TFMQDM is unknown; allowed: FP, PTQ"),
        ("metrics: {fid: fid", "metrics: {fdi: fid", "table.metrics=fdi is unknown; allowed: "),
        ("{fid: fd_digits", "{fid: fd_digitz", "table.mini_metrics=fd_digitz is unknown; allowed: fd_digits, "),
        ("caption:", "captoin:", "captoin"),
        ("seed: 0,1", "sed: 0,1", "table.mini.sed is unknown; did you mean seed? allowed: model, "),
        ("table:", "table: [", "is no preset: "),
    ],
)
def test_a_preset_with_a_typo_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any, old: str, new: str, told: str):
    source = next(path for path in [Path(tables.__file__).parents[1] / "sweeps" / f"{PRESET}.yaml"])
    text = source.read_text()
    assert old in text
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(text.replace(old, new, 1))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.jsonl").write_text("".join(json.dumps(encode(each)) + "\n" for each in some()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dqbench.rendering.presets.presets", lambda: ["mine"])
    line = fails(tmp_path / "results", monkeypatch, capsys)
    assert told in line and "mine.yaml" in line


def test_a_damaged_row_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(encode(full())) + '\n{"schema": 1, "run_')
    assert "rows.jsonl line 2 is damaged" in fails(tmp_path, monkeypatch, capsys)


def test_tables_need_no_torch() -> None:
    code = "import sys, dqbench.tables, dqbench.rendering.plots as p; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_preset_without_published_numbers_is_left_alone() -> None:
    axes = read_axes(Path(tables.__file__).parents[1] / "sweeps" / "digits.yaml")
    assert axes is not None and axes.paper is None


def test_what_is_committed_is_what_the_committed_rows_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = data_root() / "results"
    (tmp_path / "tables").mkdir()
    shutil.copy(shipped / "rows.jsonl", tmp_path)
    for main in (tables.main, iso_bits.main):
        monkeypatch.setattr(sys, "argv", ["command", f"results={tmp_path}"])
        main()
    texts = [path for path in (shipped / "tables").iterdir() if path.suffix in (".md", ".tex", ".csv")]
    computed = {path.name: path.read_bytes() for path in texts if not path.name.startswith("rate_distortion")}
    stale = [name for name, content in computed.items() if (tmp_path / "tables" / name).read_bytes() != content]
    assert len(computed) > 50 and not stale, "python -m dqbench.tables && python -m dqbench.studies.iso_bits"
