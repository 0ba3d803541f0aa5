"""One HTML page that needs nothing beside itself: render_html(sections)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dqbench.rendering.footnotes import WORDS
from dqbench.rendering.markdown import LEGEND, MARKS, STATES, command
from dqbench.rendering.plots import plot
from dqbench.rendering.presets import Preset
from dqbench.rendering.samples import gallery
from dqbench.rendering.view import Cell, Column, View


@dataclass(frozen=True)
class Section:
    """A part of the page. body: HTML, trusted; anchor: letters, digits, _ and -, unique in a page."""

    title: str
    anchor: str
    body: str
    summary: str = ""  # a few words for the table of contents


@functools.cache
def environment() -> Environment:
    """Templates that escape whatever is no Markup, and refuse a name that they do not know."""
    made = Environment(
        loader=PackageLoader("dqbench.rendering"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"MARKS": MARKS, "STATES": STATES, "WORDS": WORDS, "notes": marked}
    made.filters["groupby_run"] = neighbours
    return made


def marked(cell: Cell) -> Markup:
    """The numbers of a cell's footnotes."""
    return Markup("<sup>{}</sup>").format(", ".join(map(str, cell.notes))) if cell.notes else Markup()


def neighbours(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Columns by what stands over them."""
    return [(group, list(members)) for group, members in groupby(columns, key=lambda column: column.group)]


def render_html(sections: Sequence[Section]) -> str:
    """The whole page."""
    parts = [{"title": s.title, "anchor": s.anchor, "body": Markup(s.body), "summary": s.summary} for s in sections]
    legend = LEGEND.partition(". ")[2]
    return environment().get_template("page.html.j2").render(sections=parts, legend=legend)


def paper_section(preset: Preset, views: Sequence[View], results: Path) -> Section:
    """A paper's tables; pictures of samples are those of runs in results/runs or results/tables/samples."""
    plots = [Markup(plot(view, f"{preset.name} {index}")) for index, view in enumerate(views)]
    template = environment().get_template("paper.html.j2")
    body = template.render(
        preset=preset,
        command=command(preset),
        views=list(zip(views, plots, strict=True)),
        pictures=gallery(results, views),
    )
    return Section(preset.axes.caption, preset.name, body, f"{preset.name} · {counted(views)}")


def counted(views: Sequence[View]) -> str:
    """'13 miniature, 39 not run'."""
    found = Counter(status for view in views for status in view.statuses)
    return ", ".join(f"{count} {status}" for status, count in sorted(found.items()))
