"""Tables from finished rows: published ones (results/rows.jsonl) and local runs, in results/tables/.

The claims page (dqbench.claims) comes last.

python -m dqbench.tables [results=DIR] [json=PATH]

As Markdown: every set of comparable rows. As Markdown, LaTeX, CSV and one page, index.html: the papers' tables that
presets of sweeps/ regenerate, published numbers beside ours (dqbench.rendering).

Rows of equal settings() stand in one table. A line of it holds the rows that differ by seed alone, and says what tells
it from other lines of the same method and bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqbench.claims.page import NAME, paths, run_ids
from dqbench.claims.page import write as write_claims
from dqbench.claims.section import TITLE, html
from dqbench.claims.section import told as told_claims
from dqbench.commands import command, split_json
from dqbench.comparison import Flat, in_order, label, settings, settings_apart, spell, title
from dqbench.errors import UserError
from dqbench.identity import digest
from dqbench.metrics.base import mean_interval
from dqbench.metrics.text import decimals, ordered, quantity
from dqbench.rendering.page import Section, render_html
from dqbench.rendering.write import write_papers
from dqbench.results import Row, atomic_write, rows

COST = {"bops": "BOPs", "size_bytes": "size", "bits_per_weight": "bits/weight", "bits_per_act": "bits/act"}
NOTES = (
    "Value [low, high]: 95 % interval. Several seeds: their mean, t interval over seeds. One seed, or several with the "
    "very same value: the interval of the metric's protocol. Settings: what differs from most rows of the method and "
    "bits. Fake quantization: no speed-up is claimed. † run from uncommitted code."
)


@dataclass(frozen=True)
class Line:
    """Rows that differ by seed alone, by rising seed, and what tells them from other lines of the method and bits."""

    rows: list[Row]
    told: Flat

    def left(self) -> dict[str, str]:
        """What stands left of the metrics."""
        entry, seeds = label(self.rows[0]), ", ".join(str(row.config["seed"]) for row in self.rows)
        return {"method": entry["method"], "bits": entry["bits"], "settings": spell(self.told), "seed": seeds}

    def value(self, name: str) -> str:
        """A metric of one seed, or its mean over seeds, with the interval; a dash where a row has none."""
        found = [(row.metrics | row.paired).get(name) for row in self.rows]
        if None in found:
            return "–"
        value, low, high = (found[0][key] for key in ("value", "low", "high"))
        if len({metric["value"] for metric in found}) > 1:
            value, half = mean_interval([metric["value"] for metric in found])
            low, high = value - half, value + half
        places = decimals(value)
        return f"{value:.{places}f} [{low:.{places}f}, {high:.{places}f}]"

    def right(self) -> list[str]:
        """Cost, averaged over seeds, with a dash where a row has none; and run."""
        found = {key: [row.cost.get(key) for row in self.rows] for key in COST}
        costs = ["–" if None in own else quantity(key, sum(own) / len(own)) for key, own in found.items()]
        run = self.rows[0].run_id if len(self.rows) == 1 else f"{len(self.rows)}, below"
        dagger = "†" if any(row.provenance.get("git_dirty") for row in self.rows) else ""
        return [*costs, run + dagger]


def grouped(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by table. A table's name ends in the hash of its settings, so that it never depends on other tables."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        name = f"{title(row)} {digest(settings(row))[:6]}"
        groups.setdefault(name.replace(",", "").replace(" ", "_").lower(), []).append(row)
    return dict(sorted(groups.items()))


def merged(members: Sequence[Row]) -> list[Line]:
    """The lines of one table. Full precision has neither bits nor method: one row of a seed stands for all."""
    lines: dict[str, Line] = {}
    seen = set()
    for row, told in in_order(members):
        name = json.dumps([label(row), told])
        if (name, row.config["seed"]) not in seen:
            lines.setdefault(name, Line([], told)).rows.append(row)
        seen.add((name, row.config["seed"]))
    return list(lines.values())


def markdown(members: Sequence[Row], special: Flat) -> str:
    """The table of rows of equal settings; special: those that tell it from other tables of the same title."""
    lines = merged(members)
    names = ordered({name for row in members for name in (row.metrics | row.paired)})
    singles = [Line([row], line.told) for line in lines if len(line.rows) > 1 for row in line.rows]
    shared = {key: value for key, value in settings(members[0]).items() if not key.startswith("metrics.")}
    parts = [
        f"# {', '.join(filter(None, [title(members[0]), spell(special)]))}",
        grid(lines, members, names),
        *(["## Each seed", grid(singles, members, names)] if singles else []),
        NOTES,
        f"Settings: `{spell(shared)}`.",
        "\n\n".join(f"Cost: {text}." for text in sorted({row.cost.get("convention", "") for row in members})),
        "\n".join(protocols(members, names)),
    ]
    return "\n\n".join(parts) + "\n"


def grid(lines: Sequence[Line], members: Sequence[Row], names: Sequence[str]) -> str:
    """Lines as a Markdown table; with a column of settings where they tell lines apart."""
    found = {name: metric for row in members for name, metric in (row.metrics | row.paired).items()}
    left = [key for key in lines[0].left() if key != "settings" or any(line.told for line in lines)]
    arrows = [f"{name} {'↑' if found[name]['higher_is_better'] else '↓'}" for name in names]
    header = [*left, *arrows, *COST.values(), "run"]
    marks = ["---"] * len(left) + ["---:"] * (len(header) - len(left) - 1) + ["---"]
    body = [
        [*(line.left()[key] for key in left), *(line.value(name) for name in names), *line.right()] for line in lines
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *body))


def protocols(members: Sequence[Row], names: Sequence[str]) -> list[str]:
    """How each metric was measured; a line for each way where rows were measured in several."""
    lines = []
    for name in names:
        found = [metric for row in members if (metric := (row.metrics | row.paired).get(name))]
        lines += sorted({f"- {name}: n {each['n']:,}; {each['extractor']}; {each['protocol']}" for each in found})
    return lines


@command
def main(argv: list[str]) -> None:
    """Render every table and the page; print where they are."""
    arguments, path = split_json(argv)
    wrong = [argument for argument in arguments if not argument.startswith("results=")]
    if wrong:
        raise UserError(f"{wrong[0]} is not understood; allowed: results=DIR, json=PATH")
    results = Path(next((argument.removeprefix("results=") for argument in arguments), "results"))
    found = rows(results)
    tables = grouped(found)
    if not tables:
        raise UserError(f"{results} holds no finished rows; run `python -m dqbench` first")
    files, sections = write_papers(results, found)
    special = settings_apart([members[0] for members in tables.values()])
    for (name, members), told in zip(tables.items(), special, strict=True):
        target = results / "tables" / f"{name}.md"
        atomic_write(target, markdown(members, told))
        files[target] = [row.run_id for row in members]
    judged = write_claims(results, found)
    files |= dict.fromkeys(paths(results), run_ids(judged))
    sections.append(Section(TITLE, NAME, html(judged), told_claims(judged)))
    page = results / "tables" / "index.html"
    atomic_write(page, render_html(sections))
    print("\n".join(map(str, [*files, page])))
    if path:
        atomic_write(path, json.dumps({target.name: ids for target, ids in files.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
