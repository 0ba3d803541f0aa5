"""Tables of rows for people: one run against full precision, or one line per cell of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dqbench.results import Row

ORDER = ("fd*", "fid*", "sfd*", "sfid*", "kd*", "kid*", "is*", "precision*", "recall*", "psnr*", "ssim*", "cosine*")
MAIN = ("fd*", "fid*", "psnr*", "*error*")  # a sweep shows the first metric that fits each
COST = {"bops": "BOPs", "macs": "MACs", "size_bytes": "size", "bits_per_weight": "bits per weight"}
FAKE = "Fake quantization (rounded values, float arithmetic): no speed-up is claimed."
ARROWS = "↓ lower is better, ↑ higher is better."
DETAILS = "Intervals: python -m dqbench.results show RUN"
INTERVAL = f"[low,high] is the 95 % interval. {ARROWS}"
DIFFERENCE = "✓ better, ✗ worse, ≈ the intervals overlap."
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
Metric = Mapping[str, Any]


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print one row as a comparison, several as a sweep."""
    console = console or Console()
    console.print(run_table(rows[0]) if len(rows) == 1 else sweep_table(rows))


def run_table(row: Row) -> Table:
    """fp32 | quantized | difference for every metric of one row, then paired metrics, then cost."""
    quantized = label(row)["method"] != "fp32"
    counts = {metric["n"] for metric in (row.metrics | row.paired).values()}
    table = _table(title(row, counts), f"{INTERVAL}\n{DIFFERENCE}\n{FAKE}" if quantized else INTERVAL)
    table.add_column("metric", no_wrap=True)
    for header in ("fp32", method_bits(row), "difference") if quantized else (method_bits(row),):
        table.add_column(header, justify="right")
    if len(counts) > 1:
        table.add_column("n", justify="right", style="dim", no_wrap=True)
    for name in ordered(row.metrics):
        metric = row.metrics[name]
        cells = _compared(row.reference.get(name), metric) if quantized else [interval(metric)]
        _add(table, [_named(name, metric), *cells], metric["n"])
    if quantized and row.paired:
        _section(table, "same seeds as fp32")
        for name in ordered(row.paired):
            metric = row.paired[name]
            _add(table, [_named(name, metric), "", interval(metric), ""], metric["n"])
    _add_cost(table, row, quantized)
    return table


def _compared(reference: Metric | None, metric: Metric) -> list[Text | str]:
    if reference is None:
        return ["", interval(metric), ""]
    return [interval(reference), interval(metric), difference(reference, metric)]


def _add_cost(table: Table, row: Row, quantized: bool) -> None:
    _section(table, "cost")
    for key in (key for key in COST if key in row.cost):
        value = row.cost[key]
        full = 32 if key == "bits_per_weight" else row.cost.get(f"{key}_fp32", value)
        fewer = f"÷ {full / value:.3g}" if value and full != value else ""
        cells = [quantity(key, full), quantity(key, value), fewer] if quantized else [quantity(key, value)]
        _add(table, [COST[key], *cells], None)


def sweep_table(rows: Sequence[Row], columns: Sequence[str] = MAIN, caption: str = "") -> Table:
    """One line per cell; what all cells share stands in the title. columns: fnmatch patterns, first match each."""
    labels = [label(row) for row in rows]
    keys = list(labels[0]) if labels else []
    shared = [key for key in keys if len({entry[key] for entry in labels}) == 1 and key not in ("method", "bits")]
    table = _table(" · ".join(labels[0][key] for key in shared), caption or f"{ARROWS}\n{DETAILS}\n{FAKE}")
    for key in keys:
        if key not in shared:
            table.add_column(key, no_wrap=True)
    found = {name: metric for row in rows for name, metric in (row.metrics | row.paired).items()}
    names = main_metrics(found, columns)
    for name in names:
        table.add_column(_named(name, found[name]), justify="right")
    for header in ("BOPs", "size", "run"):
        table.add_column(header, justify="right", no_wrap=True)
    for row, entry in sorted(zip(rows, labels, strict=True), key=lambda pair: position(pair[0], pair[1])):
        values = [_short((row.metrics | row.paired).get(name)) for name in names]
        cost = [quantity(key, row.cost[key]) if key in row.cost else "" for key in ("bops", "size_bytes")]
        table.add_row(*(entry[key] for key in keys if key not in shared), *values, *cost, row.run_id[:6])
    return table


def position(row: Row, entry: Mapping[str, str]) -> tuple[Any, ...]:
    """Models and samplers apart, full precision first, then from many bits to few."""
    bits = row.config.get("bits", {})
    widths = [-bits.get(key, 0) for key in ("weight", "act")]
    return entry["model"], entry["sampler"], entry["method"] != "fp32", widths, entry["method"], row.run_id


def main_metrics(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The first name that fits each pattern, each name once."""
    matches = (next((name for name in ordered(names) if fnmatch(name, pattern)), None) for pattern in patterns)
    return list(dict.fromkeys(name for name in matches if name))


def ordered(names: Iterable[str]) -> list[str]:
    """Metric names in the field's usual order, unknown ones last, by name."""
    ranks = {name: next((i for i, pattern in enumerate(ORDER) if fnmatch(name, pattern)), len(ORDER)) for name in names}
    return sorted(ranks, key=lambda name: (ranks[name], len(name), name))


def label(row: Row) -> dict[str, str]:
    """model, method, bits and sampler of a row, as people say them."""
    config = row.config
    bits, sampler = config.get("bits", {}), config.get("sampler", {})
    name = str(config.get("method", {}).get("name", "?"))
    return {
        "model": str(config.get("model", {}).get("name", "?")),
        "method": name,
        "bits": "–" if name == "fp32" else "w{}a{}".format(bits.get("weight", "?"), bits.get("act", "?")),
        "sampler": f"{sampler.get('scheduler', '?').removesuffix('Scheduler')} {sampler.get('steps', '?')} steps",
    }


def title(row: Row, counts: Iterable[int]) -> str:
    """The line above a run's table; counts: how many samples its metrics saw."""
    entry = label(row)
    samples = [f"n = {n:,}" for n in counts]
    return " · ".join([entry["model"], entry["sampler"], *(samples if len(samples) == 1 else []), f"run {row.run_id}"])


def method_bits(row: Row) -> str:
    """'qdiffusion w4a8'; full precision has no bits to tell."""
    entry = label(row)
    return entry["method"] if entry["method"] == "fp32" else f"{entry['method']} {entry['bits']}"


def interval(metric: Metric) -> Text:
    """'13.04 [12.10,14.02]', the interval dim; the value's size sets the decimals."""
    places = decimals(metric["value"])
    text = Text(f"{metric['value']:.{places}f}", style="bold")
    if metric.get("low") is not None and metric.get("high") is not None:
        text.append(f" [{metric['low']:.{places}f},{metric['high']:.{places}f}]", style="dim not bold")
    return text


def difference(reference: Metric, metric: Metric) -> Text:
    """Signed difference to full precision, and whether it is better, worse or within the intervals."""
    delta = metric["value"] - reference["value"]
    text = f"{delta:+.{decimals(max(abs(reference['value']), abs(metric['value'])))}f}"
    if not apart(reference, metric):
        return Text(f"{text} ≈", style="dim")
    better = (delta > 0) == bool(metric["higher_is_better"])
    return Text(f"{text} {'✓' if better else '✗'}", style="green" if better else "red")


def apart(first: Metric, second: Metric) -> bool:
    """Whether two 95 % intervals do not overlap."""
    edges = [metric.get(edge) for metric in (first, second) for edge in ("low", "high")]
    return None not in edges and (edges[0] > edges[3] or edges[1] < edges[2])


def decimals(value: float) -> int:
    """Decimals that show four significant digits of a value, three of one below 1; at most four decimals."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return max(0, min(4, 3 - exponent if exponent >= 0 else 2 - exponent))


def quantity(key: str, value: float) -> str:
    """A cost for reading: 1.234 G, 4.32 MB, 4.13 bits."""
    if key == "bits_per_weight":
        return f"{value:.2f}"
    unit, scale = next((pair for pair in UNITS if value >= pair[1]), ("", 1))
    return f"{value / scale:.3g} {unit}{'B' if key == 'size_bytes' else ''}".rstrip()


def _named(name: str, metric: Metric) -> Text:
    return Text(f"{name} {'↑' if metric['higher_is_better'] else '↓'}")


def _short(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    return f"{metric['value']:.{decimals(metric['value'])}f}"


def _table(heading: str, caption: str) -> Table:
    style = {"title_style": "bold", "title_justify": "left", "caption_justify": "left", "caption_style": "dim"}
    return Table(title=Text(heading), caption=Text(caption), box=box.SIMPLE_HEAD, pad_edge=False, **style)


def _add(table: Table, cells: Sequence[Text | str], n: int | None) -> None:
    """Add a line; the number of samples only where the table has a column for it."""
    table.add_row(*cells, *([f"{n:,}" if n else ""] if len(table.columns) > len(cells) else []))


def _section(table: Table, heading: str) -> None:
    table.add_section()
    table.add_row(Text(heading, style="italic"))
