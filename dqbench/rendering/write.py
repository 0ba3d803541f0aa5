"""Writes every paper's tables: results/tables/PRESET.md, .tex, .csv, and the sections of index.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dqbench.rendering.cells import RunIds
from dqbench.rendering.flat import flat
from dqbench.rendering.latex import latex
from dqbench.rendering.markdown import markdown
from dqbench.rendering.page import Section, paper_section
from dqbench.rendering.pairs import pair
from dqbench.rendering.presets import paper_presets
from dqbench.rendering.view import look
from dqbench.results import Row, atomic_write

FORMATS = {"md": markdown, "tex": latex, "csv": flat}


def write_papers(results: Path, rows: Sequence[Row]) -> tuple[dict[Path, list[str]], list[Section]]:
    """The files with the run ids that stand in each, and a section of the page for every preset.

    Everything is computed before anything is written.
    """
    ids, texts, files, sections = RunIds(results / "cache" / "run_ids.json"), {}, {}, []
    for preset in list(paper_presets()):
        views = [look(part) for part in pair(preset, rows, ids)]
        runs = sorted({run_id for view in views for _, _, run_id in view.runs})
        for kind, write in FORMATS.items():
            path = results / "tables" / f"{preset.name}.{kind}"
            texts[path], files[path] = write(preset, views), runs
        sections.append(paper_section(preset, views, results))
    for path, text in texts.items():
        atomic_write(path, text)
    ids.save()
    return files, sections
