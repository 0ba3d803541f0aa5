"""A preset's tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dqbench.rendering.footnotes import WORDS
from dqbench.rendering.presets import Preset
from dqbench.rendering.view import Cell, View
from dqbench.studies.page import table

MARKS = {"primary": "●", "secondary": "◐", "tertiary": "○", "unverified": "?"}
STATES = {
    "primary": "read in the paper or its authors' release",
    "secondary": "read in another paper that quotes it",
    "tertiary": "read in a text about the paper",
    "unverified": "not verified",
}
LEGEND = (
    "Published numbers: "
    + ", ".join(f"{MARKS[state]} {text}" for state, text in STATES.items())
    + ". Δ fp: minus full precision, the paper's own for published numbers, ours at the same seeds for ours. Ours: "
    "value [95 % interval], the mean over seeds with its t interval; one seed: the metric's own interval. n: samples × "
    "seeds. miniature: the same method and bits on a small model, measured by the metric that its column names; it "
    "shows directions, never the paper's values. not run: published values alone. Fake quantization: no speed-up is "
    "claimed."
)


def markdown(preset: Preset, views: Sequence[View]) -> str:
    """The whole file."""
    paper = preset.paper
    where = f"{paper.name}, arXiv:{paper.arxiv}, {paper.venue}. `{command(preset)}`"
    head = [f"# {preset.axes.caption}", where, LEGEND]
    return "\n\n".join([*head, *(text for view in views for text in part(view))]) + "\n"


def command(preset: Preset) -> str:
    """What runs the cells."""
    return f"python -m dqbench +sweeps={preset.name}"


def part(view: View) -> list[str]:
    """One published table."""
    header = [escape(f"{column.group} {column.name}".strip()) for column in view.columns]
    lines = [[show(cell) for cell in line] for line in view.lines]
    notes = [f"- [{index}] {escape(text)}" for index, text in enumerate(view.notes, start=1)]
    found = [f"## {escape(view.part.table.table)}: {escape(view.title)}", table(header, lines)]
    shared = [f"- {escape(f'All {WORDS[scale]} rows, published → here: {each}.')}" for scale, each in view.protocol]
    found.append("\n".join([*(f"- {escape(text)}" for text in view.remarks), *shared, *notes]))
    found += [f"Sources: {', '.join(f'<{url}>' if '://' in url else escape(url) for url in view.sources)}."] * bool(
        view.sources
    )
    if view.runs:
        found.append("Runs: " + "; ".join(f"{what}, seed {seed}: `{run}`" for what, seed, run in view.runs) + ".")
    return found


def show(cell: Cell) -> str:
    """A cell with its mark and its footnotes."""
    text = escape(cell.text)
    notes = f" [{', '.join(map(str, cell.notes))}]" if cell.notes else ""
    return f"{text}{' ' + MARKS[cell.state] if cell.state else ''}{notes}"


def escape(text: str) -> str:
    """Text that cannot end a table's cell, nor begin emphasis, a link or HTML."""
    for sign in "\\|*_<>[]`":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
