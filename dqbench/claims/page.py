"""The claims page: results/tables/claims.md, and its numbers in claims.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dqbench.claims.book import shipped
from dqbench.claims.sheets import correction, missing, sheets, summary
from dqbench.claims.verdicts import CONTRARY, LEVEL, SHOWN, Effect, Result, judge
from dqbench.results import Row, atomic_write, rows

NAME = "claims"
NOTES = (
    "Treatment - control, paired by seed: mean ± half of the 95 % t interval; p of a one-sided paired t test in the "
    f"claimed direction. **shown**: p < {LEVEL}; **contrary**: p < {LEVEL} in the other direction; not shown: neither; "
    "not run: fewer common seeds than the claim needs. A line's own verdict is that of its first metric, the one "
    "nearest to what the paper reports. Cost: treatment against control. † some rows are of uncommitted code. A "
    "verdict is about the model and settings of its rows, and about no others."
)


def markdown(results: Sequence[Result]) -> str:
    """The whole page."""
    total, *counts = summary(results)
    parts = ["# What papers claim, and what rows show", NOTES, correction(results), table(total, counts)]
    for found in sheets(results):
        parts += [f"## {found.title}", found.where, table(found.header, found.lines)]
    if lines := missing(results):
        parts += ["## To run", "What claims that were not run lack:", "\n".join(["```bash", *lines, "```"])]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; verdicts that say something in bold."""
    body = [[bold(text) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


def bold(text: str) -> str:
    """The verdict at the end of a cell, where it is one that says something."""
    head, comma, last = text.rpartition(", ")
    return f"{head}{comma}**{last}**" if last.removesuffix(" ‡") in (SHOWN, CONTRARY) else text


def as_csv(results: Sequence[Result]) -> str:
    """records() with a header."""
    text, lines = io.StringIO(), records(results)
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One for each metric of each comparison, numbers in full; `decides`: whether it is the claim's first metric."""
    return [record(result, effect) for result in results for effect in result.effects]


def record(result: Result, effect: Effect) -> dict[str, Any]:
    """A metric of a comparison, flat."""
    claim, cell = result.comparison.claim, result.comparison.cell
    told = {key: getattr(claim, key) for key in ("id", "paper", "source", "statement")}
    told |= {"case": result.comparison.case, "seeds": " ".join(map(str, result.seeds))}
    sides = {"treatment": " ".join([*cell, *claim.treatment]), "control": " ".join([*cell, *claim.control])}
    values = {f"{key}_mean" if key in sides else key: value for key, value in asdict(effect).items()}
    return {**told, **sides, **values, "decides": effect is result.effects[0]}


def write(folder: Path, found: Sequence[Row] | None = None) -> list[Result]:
    """Write folder/tables/claims.md and claims.csv on the rows of a results folder (or on these)."""
    results = judge(shipped(folder / "cache"), rows(folder) if found is None else found)
    for path, text in zip(paths(folder), (markdown(results), as_csv(results)), strict=True):
        atomic_write(path, text)
    return results


def run_ids(results: Sequence[Result]) -> list[str]:
    """Of all rows that are compared."""
    sides = (side for result in results for side in (result.treatment, result.control))
    return sorted({row.run_id for side in sides for row in side.values()})


def paths(folder: Path) -> list[Path]:
    """Where write() leaves the page and its numbers."""
    return [folder / "tables" / f"{NAME}.{kind}" for kind in ("md", "csv")]
