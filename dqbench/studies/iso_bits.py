"""Quality against the bits that are really stored, of all finished rows: scales, flags, indices and codebooks included.

python -m dqbench.studies.iso_bits [results=DIR] [json=PATH]

One page for each set of comparable rows, as in dqbench.tables; seeds are averaged, ablations left out. A row is on the
front where no other one has as few bits per weight and per activation, and a lower distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from dqbench.commands import command
from dqbench.comparison import label, spell, title
from dqbench.config import data_root
from dqbench.errors import UserError
from dqbench.metrics.text import first_fits
from dqbench.results import Row, rows
from dqbench.studies.page import arguments, save, save_json, table
from dqbench.tables import Line, grouped, merged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "iso_bits"
DISTANCES, FIDELITIES = ("fd*", "fid*"), ("psnr*",)
AXES = {"bits_per_weight": "stored bits per weight", "bits_per_act": "stored bits per activation"}
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """A method at its bits: means over seeds. values: metric -> value, None where it was not measured.

    bits_per_act: None in rows from before it was billed; they are never on the front, nor do they keep others off it.
    """

    method: str
    bits: str
    settings: str
    seeds: int
    bits_per_weight: float
    bits_per_act: float | None
    values: dict[str, float | None]
    front: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} ({self.settings})" if self.settings else self.method


def points(members: Sequence[Row], metrics: Sequence[str]) -> list[Point]:
    """Of comparable rows, those on the front marked."""
    found = [to_point(line, metrics) for line in merged(members)]
    return [Point(**{**vars(point), "front": is_on_front(point, found, metrics[0])}) for point in found]


def to_point(line: Line, metrics: Sequence[str]) -> Point:
    """One line of a table."""
    entry = label(line.rows[0])
    values = {name: average([measured(row, name) for row in line.rows]) for name in metrics}
    bits = {key: average([row.cost.get(key) for row in line.rows]) for key in AXES}
    return Point(entry["method"], entry["bits"], spell(line.told), len(line.rows), **bits, values=values)


def measured(row: Row, name: str) -> float | None:
    """The value of a metric, None where the row has none."""
    metric = (row.metrics | row.paired).get(name)
    return None if metric is None else metric["value"]


def average(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    return None if None in values else sum(values) / len(values)


def is_on_front(point: Point, others: Sequence[Point], distance: str) -> bool:
    """Whether no other point is as small in both bits, at a lower distance."""
    known = [other for other in others if None not in (other.values[distance], other.bits_per_act)]
    return point in known and not any(
        other.values[distance] < point.values[distance]
        and other.bits_per_weight <= point.bits_per_weight
        and other.bits_per_act <= point.bits_per_act
        for other in known
    )


def points_table(found: Sequence[Point], metrics: Sequence[str]) -> str:
    """By bits, nominal and then stored."""
    order = sorted(found, key=lambda point: (point.bits, point.bits_per_act or 0, point.bits_per_weight, point.name))
    body = [
        [
            *(point.name, point.bits),
            *(shown(getattr(point, key), ".2f") for key in AXES),
            *(shown(point.values[name], "#.4g") for name in metrics),
            *(str(point.seeds), "●" if point.front else ""),
        ]
        for point in order
    ]
    return table(["method", "bits", "bits / weight", "bits / activation", *metrics, "seeds", "front"], body)


def shown(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)


def draw(found: Sequence[Point], metrics: Sequence[str]) -> Figure:
    """A panel for each metric and kind of bits; full precision is a line across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), len(AXES), squeeze=False)
    for row, metric in zip(panels, metrics, strict=True):
        for axes, (key, text) in zip(row, AXES.items(), strict=True):
            draw_panel(axes, found, metric, key)
            axes.set(xlabel=text, ylabel=metric, yscale="linear" if metric.startswith("psnr") else "log")
            axes.grid(alpha=0.3)
    pairs = [pair for axes in panels.flatten() for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    labels = {text: handle for handle, text in pairs}
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize="small")
    return figure


def draw_panel(axes: Axes, found: Sequence[Point], metric: str, key: str) -> None:
    """A color for each method, a marker for each nominal bit-width."""
    from matplotlib import colormaps

    drawn = [point for point in found if None not in (point.values[metric], getattr(point, key))]
    methods = {name: i for i, name in enumerate(sorted({point.name for point in found if point.method != "fp32"}))}
    widths = {bits: MARKERS[i % len(MARKERS)] for i, bits in enumerate(sorted({point.bits for point in found}))}
    for point in drawn:
        if point.method == "fp32":
            axes.axhline(point.values[metric], color="black", linewidth=0.8, label="fp32")
            continue
        color = colormaps["tab20"](methods[point.name] % 20)
        name = f"{point.name} {point.bits}"
        marker = widths[point.bits]
        axes.plot(getattr(point, key), point.values[metric], color=color, marker=marker, linestyle="", label=name)


def ablations() -> set[str]:
    """Names of methods with parts switched off, conf/method/ablation: they are no methods of their own."""
    contents = map(OmegaConf.load, (data_root() / "conf" / "method" / "ablation").glob("*.yaml"))
    return {str(content.get("name") or content.method.name) for content in contents if content}


def write(results: Path) -> dict[Path, list[dict[str, Any]]]:
    """A page and a picture for each set of comparable rows; their points by page."""
    pages, parts = {}, ablations()
    whole = [row for row in rows(results) if row.config["method"]["name"] not in parts]
    for name, members in grouped(whole).items():
        available = {key for row in members for key in (row.metrics | row.paired)}
        metrics = [found for kind in (DISTANCES, FIDELITIES) for found in first_fits(available, kind)[:1]]
        if not metrics or all(label(row)["method"] == "fp32" for row in members):
            continue
        found = points(members, metrics)
        heading = f"# Quality against stored bits: {title(members[0])}"
        content = [heading, notes(metrics), points_table(found, metrics)]
        page, _ = save(results / "tables", f"{NAME}_{name}", content, draw(found, metrics))
        pages[page] = [asdict(point) for point in found]
    return pages


def notes(metrics: Sequence[str]) -> str:
    """How to read the page."""
    return (
        "Bits per weight and per activation as stored, scales, flags, indices and codebooks included; activations "
        f"weighted by the MACs that read them. ● no other row is as small in both with a lower {metrics[0]}. Fake "
        "quantization: no speed-up is claimed."
    )


@command
def main(argv: list[str]) -> None:
    """Write the pages, say where they are."""
    results, path = arguments(argv)
    pages = write(results)
    if not pages:
        raise UserError(f"{results} holds no finished rows of quantized models; run `python -m dqbench +sweeps={NAME}`")
    print("\n".join(map(str, pages)))
    save_json(path, as_json(pages))


def as_json(pages: Mapping[Path, Any]) -> dict[str, Any]:
    """Points by the name of their page."""
    return {page.name: found for page, found in pages.items()}


if __name__ == "__main__":
    main()
