"""Tables from finished rows: published ones (results/rows.jsonl) and local runs, as Markdown in results/tables/.

python -m dqbench.tables [results=DIR] [json=PATH]

Rows of equal settings() stand in one table. A line of it holds the rows that differ by seed alone, and says what tells
it from other lines of the same method and bits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqbench.config import command, digest, split_json
from dqbench.errors import UserError
from dqbench.metrics.base import mean_interval
from dqbench.metrics.text import decimals, ordered, quantity
from dqbench.results import Row, atomic_write, rows

HOW = ("units", "official_order", "shortcuts", "time_embedding")  # of a model: how it is quantized, not what it is
NOT_SETTINGS = (*(f"model.{key}" for key in HOW), "sampler.batch_size", "metrics.batch_size")
BY_CONTENT = {"checkpoint": ("model.path",), "reference": ("model.data", "metrics.weights")}  # reference: both
COST = ("bops", "size_bytes", "bits_per_weight")
ABSENT = "(absent)"  # what a config has under a key that another has
LONG = 32  # characters of a value; more are cut
NOTES = (
    "Value [low, high]: 95 % interval. Several seeds: their mean, t interval over seeds. One seed: the interval of the "
    "metric's protocol. Settings: what differs from most rows of the method and bits. Fake quantization: no speed-up "
    "is claimed. † run from uncommitted code."
)
Flat = dict[str, Any]  # dotted key -> value


def label(row: Row) -> dict[str, str]:
    """model, method, bits, sampler and number of samples of a row, as people say them."""
    bits, sampler, method = (row.config.get(key, {}) for key in ("bits", "sampler", "method"))
    name = method_name(method)
    return {
        "model": str(row.config.get("model", {}).get("name", "?")),
        "method": name,
        "bits": "–" if name == "fp32" else "w{}a{}".format(bits.get("weight", "?"), bits.get("act", "?")),
        "sampler": f"{sampler.get('scheduler', '?').removesuffix('Scheduler')} {sampler.get('steps', '?')} steps",
        "samples": f"{sampler.get('num_samples', 0):,} samples",
    }


def title(row: Row) -> str:
    """'digits_ddpm, DDIM 50 steps, 1,024 samples'."""
    entry = label(row)
    return f"{entry['model']}, {entry['sampler']}, {entry['samples']}"


def method_name(method: Mapping[str, Any]) -> str:
    """A method's name; with that of the method it builds on, if any."""
    name, base = str(method.get("name", "?")), method.get("base")
    return f"{name} on {method_name(base)}" if isinstance(base, Mapping) else name


def settings(row: Row) -> Flat:
    """What makes rows comparable: model, sampler and metrics; what lies in files by its content, not by its path."""
    flat = leaves({part: row.config.get(part, {}) for part in ("model", "sampler", "metrics")})
    hashes = {name: row.provenance.get(f"{name}_hash") for name in BY_CONTENT}
    known = {name: value[:12] for name, value in hashes.items() if value}
    paths = {path for name in known for path in BY_CONTENT[name]}
    return known | {k: v for k, v in flat.items() if k not in paths and not k.startswith(NOT_SETTINGS)}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested mappings as one with dotted keys; lists and empty mappings are values."""
    flat: Flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def settings_apart(found: Sequence[Row]) -> list[Flat]:
    """Per row the settings in which it differs from most rows of its title."""
    return differences([settings(row) for row in found], [title(row) for row in found])


def methods_apart(found: Sequence[Row]) -> list[Flat]:
    """Per row what differs from most rows of its settings, method and bits, the seed excepted; nothing for fp32."""
    contents, groups = [], []
    for row in found:
        entry = label(row)
        config = {} if entry["method"] == "fp32" else {key: row.config[key] for key in row.config if key != "seed"}
        contents.append(leaves(config))
        groups.append((digest(settings(row)), entry["method"], entry["bits"]))
    return differences(contents, groups)


def differences(contents: Sequence[Flat], groups: Sequence[Hashable]) -> list[Flat]:
    """Per content its entries that most contents of its group have otherwise; all entries that differ at a draw."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    result: list[Flat] = [{} for _ in contents]
    for indices in members.values():
        for key, texts in _varying([contents[index] for index in indices]).items():
            (usual, count), second = [*Counter(texts).most_common(2)]
            for index, text in zip(indices, texts, strict=True):
                if text != usual or second[1] == count:
                    result[index][key] = contents[index].get(key, ABSENT)
    return result


def _varying(contents: Sequence[Flat]) -> dict[str, tuple[str, ...]]:
    """The values, as JSON, under keys where they differ; not of method.recon.iters where recon.iters says the same."""
    keys = sorted(set().union(*contents)) if len(contents) > 1 else []
    texts = {key: tuple(json.dumps(flat.get(key, ABSENT)) for flat in contents) for key in keys}
    varying = {key: values for key, values in texts.items() if len(set(values)) > 1}

    def copied(key: str) -> bool:
        parts = key.split(".")
        return any(varying.get(".".join(parts[start:])) == varying[key] for start in range(1, len(parts)))

    return {key: values for key, values in varying.items() if not copied(key)}


def spell(told: Flat) -> str:
    """'recon.iters=20000 method.vsc=false'; a long value is cut and ends in its hash."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    cut = {key: text if len(text) <= LONG else f"{text[: LONG - 8]}…{digest(text)[:4]}" for key, text in texts.items()}
    return " ".join(f"{key}={text}" for key, text in cut.items())


def in_order(found: Sequence[Row]) -> list[tuple[Row, Flat]]:
    """Rows in reading order, each with what its label does not tell: full precision first, then falling bits."""
    told = [some | more for some, more in zip(settings_apart(found), methods_apart(found), strict=True)]
    return sorted(zip(found, told, strict=True), key=lambda pair: _position(*pair))


def _position(row: Row, told: Flat) -> tuple[Any, ...]:
    entry, bits = label(row), row.config.get("bits", {})
    widths = [-bits.get(key, 0) for key in ("weight", "act")]
    special = [(key, _natural(value)) for key, value in told.items()]
    quantized = entry["method"] != "fp32"
    return entry["model"], entry["sampler"], quantized, widths, entry["method"], special, row.config["seed"], row.run_id


def _natural(value: Any) -> tuple[int, Any]:
    """Sorts numbers by size, everything else after them, by its text."""
    return (0, value) if isinstance(value, (int, float)) else (1, json.dumps(value, sort_keys=True))


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
        if len(found) > 1:
            value, half = mean_interval([metric["value"] for metric in found])
            low, high = value - half, value + half
        places = decimals(value)
        return f"{value:.{places}f} [{low:.{places}f}, {high:.{places}f}]"

    def right(self) -> list[str]:
        """Cost, averaged over seeds, and run."""
        means = [sum(row.cost[key] for row in self.rows) / len(self.rows) for key in COST]
        run = self.rows[0].run_id if len(self.rows) == 1 else f"{len(self.rows)}, below"
        dagger = "†" if any(row.provenance.get("git_dirty") for row in self.rows) else ""
        return [*(quantity(key, mean) for key, mean in zip(COST, means, strict=True)), run + dagger]


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
        f"Cost: {members[0].cost.get('convention', '')}.",
        "\n".join(protocols(members, names)),
    ]
    return "\n\n".join(parts) + "\n"


def grid(lines: Sequence[Line], members: Sequence[Row], names: Sequence[str]) -> str:
    """Lines as a Markdown table; with a column of settings where they tell lines apart."""
    found = {name: metric for row in members for name, metric in (row.metrics | row.paired).items()}
    left = [key for key in lines[0].left() if key != "settings" or any(line.told for line in lines)]
    arrows = [f"{name} {'↑' if found[name]['higher_is_better'] else '↓'}" for name in names]
    header = [*left, *arrows, "BOPs", "size", "bits/weight", "run"]
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
    """Render every table; print where they are."""
    arguments, path = split_json(argv)
    wrong = [argument for argument in arguments if not argument.startswith("results=")]
    if wrong:
        raise UserError(f"{wrong[0]} is not understood; allowed: results=DIR, json=PATH")
    results = Path(next((argument.removeprefix("results=") for argument in arguments), "results"))
    tables = grouped(rows(results))
    if not tables:
        raise UserError(f"{results} holds no finished rows; run `python -m dqbench` first")
    special = settings_apart([members[0] for members in tables.values()])
    for (name, members), told in zip(tables.items(), special, strict=True):
        target = results / "tables" / f"{name}.md"
        atomic_write(target, markdown(members, told))
        print(target)
    if path:
        content = {f"{name}.md": [row.run_id for row in members] for name, members in tables.items()}
        atomic_write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
