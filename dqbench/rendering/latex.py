r"""A preset's tables as LaTeX: table environments for \input, with booktabs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from dqbench.rendering.footnotes import WORDS
from dqbench.rendering.markdown import LEGEND, command
from dqbench.rendering.presets import Preset
from dqbench.rendering.view import Cell, View

MARKS = {"primary": r"$\bullet$", "secondary": r"$\odot$", "tertiary": r"$\circ$", "unverified": "?"}
SIGNS = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # after \\ a bracket is an argument
    "]": "{]}",
    "–": "--",
    "—": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\to$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "Δ": r"$\Delta$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "†": r"$\dagger$",
    "…": r"\dots{}",
    "●": MARKS["primary"],
    "◐": MARKS["secondary"],
    "○": MARKS["tertiary"],
}


def latex(preset: Preset, views: Sequence[View]) -> str:
    """The whole file."""
    head = f"% {command(preset)}\n% needs \\usepackage{{booktabs}}; arXiv:{preset.paper.arxiv}\n"
    return head + "\n".join(part(preset, view) for view in views)


def part(preset: Preset, view: View) -> str:
    """One table environment."""
    spec = "".join("r" if column.number else "l" for column in view.columns)
    caption = f"{preset.axes.caption}. {preset.paper.name}, {view.part.table.table}: {view.title}."
    body = [
        r"\begin{table}[p]",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        f"\\caption{{{escape(caption)}}}",
        f"\\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        *groups(view),
        row([escape(column.name.strip()) for column in view.columns]),
        r"\midrule",
        *(row([show(cell) for cell in line]) for line in view.lines),
        r"\bottomrule",
        r"\end{tabular}",
        *paragraphs(view),
        r"\end{table}",
    ]
    return "\n".join(body) + "\n"


def groups(view: View) -> list[str]:
    """The line over the columns' names, and the rules under it."""
    cells, rules, start = [], [], 1
    for group, members in groupby(view.columns, key=lambda column: column.group):
        width = len(list(members))
        cells.append(f"\\multicolumn{{{width}}}{{c}}{{{escape(group)}}}")
        rules += [f"\\cmidrule(lr){{{start}-{start + width - 1}}}"] if group else []
        start += width
    return [row(cells), "".join(rules)] if rules else []


def row(cells: Sequence[str]) -> str:
    """One line of a tabular."""
    return " & ".join(cells) + r" \\"


def show(cell: Cell) -> str:
    """A cell with its mark and its footnotes."""
    marks = [MARKS[cell.state]] if cell.state else []
    marks += [",".join(map(str, cell.notes))] if cell.notes else []
    return escape(cell.text) + (f"\\textsuperscript{{{' '.join(marks)}}}" if marks else "")


def paragraphs(view: View) -> list[str]:
    """Legend, remarks, footnotes."""
    notes = [f"\\textsuperscript{{{index}}} {escape(text)}" for index, text in enumerate(view.notes, start=1)]
    texts = [escape(LEGEND), *map(escape, view.remarks), *shared(view), *notes]
    return ["", r"\smallskip\raggedright\scriptsize", *(f"{text}\\par" for text in texts)]


def shared(view: View) -> list[str]:
    """How all of our rows differ."""
    return [escape(f"All {WORDS[scale]} rows, published → here: {each}.") for scale, each in view.protocol]


def escape(text: str) -> str:
    """Text without anything that LaTeX would read as more than text; other signs than ASCII as commands."""
    return "".join(SIGNS.get(sign, sign) for sign in text)
