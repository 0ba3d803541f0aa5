"""Tables from finished rows: published ones (results/rows.jsonl) and local runs, as Markdown in results/tables/.

python -m dqbench.tables [results=DIR] [json=PATH]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqbench.config import command, split_json
from dqbench.errors import UserError
from dqbench.report import decimals, label, ordered, position, quantity
from dqbench.results import Row, atomic_write, rows

Cell = dict[str, Any]


def settings(row: Row) -> tuple[str, str, int]:
    """What the rows of one table share: model, sampler, number of samples."""
    entry = label(row)
    return entry["model"], entry["sampler"], row.config["sampler"]["num_samples"]


def grouped(found: Sequence[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows by settings, each group in reading order: full precision first, then from many bits to few."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    full = set()  # full precision has no bits: one row of a seed stands for all
    for row in sorted(found, key=lambda row: (settings(row), position(row, label(row)))):
        key = (settings(row), row.config["seed"])
        if label(row)["method"] != "fp32" or key not in full:
            groups.setdefault(settings(row), []).append(row)
        if label(row)["method"] == "fp32":
            full.add(key)
    return groups


def markdown(group: tuple[str, str, int], members: Sequence[Row]) -> str:
    """One table: a line per row, every metric with its 95 % interval, then cost."""
    names = ordered({name for row in members for name in (row.metrics | row.paired)})
    found = {name: metric for row in members for name, metric in (row.metrics | row.paired).items()}
    arrows = [f"{name} {'↑' if found[name]['higher_is_better'] else '↓'}" for name in names]
    header = ["method", "bits", "seed", *arrows, "BOPs", "size", "bits/weight", "run"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 4) + ["---"]]
    lines += [line(row, names) for row in members]
    protocols = [
        f"- {name}: n {found[name]['n']:,}; {found[name]['extractor']}; {found[name]['protocol']}" for name in names
    ]
    title = f"# {group[0]}, {group[1]}, {group[2]:,} samples"
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = [
        "Value [low, high]: 95 % interval. Fake quantization: no speed-up is claimed. † run from uncommitted code.",
        f"Cost: {members[0].cost.get('convention', '')}.",
    ]
    return "\n\n".join([title, body, *notes, "\n".join(protocols)]) + "\n"


def line(row: Row, names: Sequence[str]) -> list[str]:
    """The cells of one row."""
    entry, metrics = label(row), row.metrics | row.paired
    dagger = "†" if row.provenance.get("git_dirty") else ""
    cost = [quantity(key, row.cost[key]) for key in ("bops", "size_bytes", "bits_per_weight")]
    values = [value(metrics.get(name)) for name in names]
    return [entry["method"], entry["bits"], str(row.config["seed"]), *values, *cost, f"{row.run_id}{dagger}"]


def value(metric: Cell | None) -> str:
    """A metric with its interval; a dash where the row has none."""
    if metric is None:
        return "–"
    places = decimals(metric["value"])
    return " ".join((f"{metric['value']:.{places}f}", f"[{metric['low']:.{places}f}, {metric['high']:.{places}f}]"))


def file_name(group: tuple[str, str, int]) -> str:
    """A file for each table."""
    return f"{'_'.join(str(part) for part in group).replace(' ', '_')}.md".lower()


@command
def main(argv: list[str]) -> None:
    """Render every table; print where they are."""
    arguments, path = split_json(argv)
    wrong = [argument for argument in arguments if not argument.startswith("results=")]
    if wrong:
        raise UserError(f"{wrong[0]} is not understood; allowed: results=DIR, json=PATH")
    results = Path(next((argument.removeprefix("results=") for argument in arguments), "results"))
    tables = grouped(rows(results))
    if not tables:
        raise UserError(f"{results} holds no finished rows; run `python -m dqbench` first")
    for group, members in tables.items():
        target = results / "tables" / file_name(group)
        atomic_write(target, markdown(group, members))
        print(target)
    if path:
        content = {file_name(group): [row.run_id for row in members] for group, members in tables.items()}
        atomic_write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
