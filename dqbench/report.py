"""Tables of rows for people: one run against full precision, or one line per cell of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqbench.comparison import in_order, label, spell
from dqbench.metrics.text import decimals, first_fits, ordered, quantity

if TYPE_CHECKING:
    from dqbench.results import Row

MAIN = ("fd*", "fid*", "exact*", "nll*", "psnr*", "kl", "*error*")  # a sweep shows the first metric that fits each
COST = {
    "bops": "BOPs",
    "macs": "MACs",
    "size_bytes": "size",
    "bits_per_weight": "bits per weight",
    "bits_per_act": "bits per activation",
}
FAKE = "Fake quantization (rounded values, float arithmetic): no speed-up is claimed."
ARROWS = "↓ lower is better, ↑ higher is better."
DETAILS = "Intervals: python -m dqbench.results show RUN"
INTERVAL = f"[low,high] is the 95 % interval. {ARROWS}"
DIFFERENCE = "± is the 95 % interval of the paired difference. ✓ better, ✗ worse, ≈ neither."
Metric = Mapping[str, Any]


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print one row as a comparison, several as a sweep."""
    console = console or Console()
    table = run_table(rows[0]) if len(rows) == 1 else sweep_table(rows)
    unbounded = console.options.update_width(1000)
    narrow = len(rows) > 1 and console.measure(table, options=unbounded).maximum > console.width
    console.print(sweep_table(rows, notes=True) if narrow else table)


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
        cells = _compared(row, name) if quantized else [interval(metric)]
        _add(table, [_named(name, metric), *cells], metric["n"])
    if quantized and row.paired:
        _section(table, "same seeds as fp32")
        for name in ordered(row.paired):
            metric = row.paired[name]
            _add(table, [_named(name, metric), "", interval(metric), ""], metric["n"])
    _add_cost(table, row, quantized)
    return table


def _compared(row: Row, name: str) -> list[Text | str]:
    metric, reference = row.metrics[name], row.reference.get(name)
    if reference is None:
        return ["", interval(metric), ""]
    return [interval(reference), interval(metric), difference(reference, metric, row.difference.get(name))]


def _add_cost(table: Table, row: Row, quantized: bool) -> None:
    _section(table, "cost")
    for key in (key for key in COST if key in row.cost):
        value = row.cost[key]
        full = 32 if key.startswith("bits_per_") else row.cost.get(f"{key}_fp32", value)
        fewer = f"÷ {full / value:.3g}" if value and full != value else ""
        cells = [quantity(key, full), quantity(key, value), fewer] if quantized else [quantity(key, value)]
        _add(table, [COST[key], *cells], None)


def sweep_table(rows: Sequence[Row], columns: Sequence[str] = MAIN, notes: bool = False) -> Table:
    """One line per cell; what all cells share stands in the title. columns: fnmatch patterns, first match each.

    What tells cells of the same method and bits apart stands in a column, or, to save width, with `notes` below.
    """
    lines = in_order(rows)
    told = [spell(special) for _, special in lines]
    numbers = {text: str(number) for number, text in enumerate(dict.fromkeys(filter(None, told)), 1)} if notes else {}
    entries = [
        label(row) | {"seed": str(row.config["seed"]), "note" if notes else "settings": numbers.get(text, text)}
        for (row, _), text in zip(lines, told, strict=True)
    ]
    own = [key for key in entries[0] if key in ("method", "bits") or len({entry[key] for entry in entries}) > 1]
    shared = [f"seed {value}" if key == "seed" else value for key, value in entries[0].items() if key not in own]
    below = [f"note {number}: {text}" for text, number in numbers.items()]
    table = _table(" · ".join(filter(None, shared)), "\n".join([*below, ARROWS, DETAILS, FAKE]))
    for key in own:
        table.add_column(key, no_wrap=key != "method", min_width=10 if key == "method" else None)
    left = [[entry[key] for key in own] for entry in entries]
    _add_values(table, [row for row, _ in lines], left, columns, ("bops",) if notes else ("bops", "size_bytes"))
    return table


def _add_values(
    table: Table, rows: Sequence[Row], left: Sequence[list[str]], columns: Sequence[str], costs: Sequence[str]
) -> None:
    """The lines of a sweep: what stands left, the main metrics, costs and run."""
    found = {name: metric for row in rows for name, metric in (row.metrics | row.paired).items()}
    names = first_fits(found, columns)
    for name in names:
        table.add_column(_named(name, found[name]), justify="right", min_width=6, overflow="fold")
    for header in [*(COST[key] for key in costs), "run"]:
        table.add_column(header, justify="right", no_wrap=True)
    for row, cells in zip(rows, left, strict=True):
        values = [_short((row.metrics | row.paired).get(name)) for name in names]
        cost = [quantity(key, row.cost[key]) if key in row.cost else "" for key in costs]
        table.add_row(*cells, *values, *cost, row.run_id[:6])


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


def difference(reference: Metric, metric: Metric, paired: Metric | None) -> Text:
    """Signed difference to full precision; with its paired interval also whether it is better, worse or may be none."""
    places = decimals(max(abs(reference["value"]), abs(metric["value"])))
    delta = metric["value"] - reference["value"]
    if paired is None:
        return Text(f"{delta:+.{places}f}")
    text = f"{delta:+.{places}f} ± {(paired['high'] - paired['low']) / 2:.{places}f}"
    if paired["low"] <= 0 <= paired["high"]:
        return Text(f"{text} ≈", style="dim")
    better = (delta > 0) == bool(metric["higher_is_better"])
    return Text(f"{text} {'✓' if better else '✗'}", style="green" if better else "red")


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
