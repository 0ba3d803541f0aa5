"""The claims page as a section of an HTML page: tables and paragraphs, no style, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from itertools import takewhile

from dqbench.claims.page import NOTES
from dqbench.claims.sheets import correction, missing, sheets, summary
from dqbench.claims.verdicts import VERDICTS, Result

TITLE = "What papers claim, and what rows show"
TOLD_ONCE = 2  # columns that further cases of a claim leave empty: claim, source


def told(results: Sequence[Result]) -> str:
    """'9 shown, 25 not shown, 2 contrary, 28 not run'."""
    counts = Counter(result.verdict for result in results)
    return ", ".join(f"{counts[word]} {word}" for word in VERDICTS)


def html(results: Sequence[Result]) -> str:
    """The page below its heading."""
    total, *counts = summary(results)
    parts = [paragraph(NOTES), paragraph(correction(results)), part("By paper", "", total, counts)]
    parts += [part(own.title, own.where, own.header, own.lines) for own in sheets(results)]
    if commands := "\n".join(missing(results)):
        code = f'<div class="scroll" tabindex="0"><pre>{escape(commands)}</pre></div>'
        parts.append(f'<section class="part"><h3>To run</h3>{code}</section>')
    return "\n".join(parts)


def paragraph(text: str) -> str:
    """Of Markdown that has no other marks than bold."""
    pieces = [f"<strong>{piece}</strong>" if odd % 2 else piece for odd, piece in enumerate(escape(text).split("**"))]
    return f'<p class="meta">{"".join(pieces)}</p>'


def part(title: str, where: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table under its heading; it scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows_of(lines))
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'
    meta = f'<p class="meta">{escape(where)}</p>' if where else ""
    return f'<section class="part">\n<h3>{escape(title)}</h3>{meta}\n{region}\n</section>'


def rows_of(lines: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """The cells of each line; what further cases of a claim leave empty belongs to the cell above."""
    for index, line in enumerate(lines):
        further = len(list(takewhile(lambda other: not other[0], lines[index + 1 :])))
        span = f' rowspan="{further + 1}"' if line[0] and further else ""
        first = [f'<th scope="row"{span}>{escape(line[0])}</th>'] if line[0] else []
        once = [f'<td class="source"{span}>{escape(text)}</td>' for text in line[1:TOLD_ONCE]] if line[0] else []
        yield [*first, *(once or []), *map(cell, line[TOLD_ONCE:])]


def cell(text: str) -> str:
    """A verdict as a pill; an effect above its p value and verdict."""
    word = text.removesuffix(" ‡")
    if word in VERDICTS:
        return f'<td><span class="pill {word.replace(" ", "-")}">{escape(text)}</span></td>'
    value, comma, rest = text.partition(", p ")
    more = f'<span class="interval">p {escape(rest)}</span>' if comma else ""
    return f"<td>{escape(value)}{more}</td>"
