"""Published and reproduced distance from full precision, method by method, as an SVG for inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqbench import published
from dqbench.rendering.estimates import Estimate, change
from dqbench.rendering.footnotes import WORDS
from dqbench.rendering.view import View, has_change, published_change, scales_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"#111111": "currentColor", "#222222": "var(--line)", "#333333": "var(--published)", "#444444": "var(--ours)"}
TEXT, LINE, PUBLISHED, OURS = COLORS
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": LINE,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass(frozen=True)
class Dot:
    """A method at its bits, and what it loses against full precision."""

    name: str
    verified: bool
    published: float
    ours: Estimate | None


def plot(view: View, name: str) -> str:
    """The SVG of the first metric that is both published and ours; empty where fewer than two rows have both."""
    part = view.part
    for metric in [metric for metric in part.table.rows[0].values if has_change(part, metric)]:
        for scale in scales_of(part, metric):
            own = part.metrics[scale][metric]
            dots = [
                Dot(f"{row.method} {row.bits}", row.state != "unverified", moved, change(pair.ours[scale], own))
                for pair in part.pairs
                if (moved := published_change(part, row := pair.published, metric)) is not None
            ]
            if sum(dot.ours is not None for dot in dots) > 1:
                label = published.metrics()[metric].label
                return draw(dots, (f"Δ {label}, published", f"Δ {own}, {WORDS[scale]}"), name)
    return ""


def draw(dots: Sequence[Dot], labels: tuple[str, str], name: str) -> str:
    """Two panels that share their lines."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(7.6, 0.9 + 0.24 * len(dots)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for y, dot in enumerate(dots):
            left.plot(dot.published, y, "o", color=PUBLISHED, fillstyle="full" if dot.verified else "none")
            if dot.ours:
                right.plot([dot.ours.low, dot.ours.high], [y, y], color=OURS, linewidth=1.5)
                right.plot(dot.ours.value, y, "o", color=OURS)
        left.set_yticks(range(len(dots)), [dot.name for dot in dots])
        left.invert_yaxis()
        finish(left, [dot.published for dot in dots], labels[0])
        finish(right, [bound for dot in dots if dot.ours for bound in (dot.ours.low, dot.ours.high)], labels[1])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), labels)


def finish(axes: Axes, found: Sequence[float], label: str) -> None:
    """Zero as a line; logarithmic far from it where a few values dwarf the others."""
    sizes = sorted(abs(value) for value in found)
    middle = sizes[len(sizes) // 2]
    if middle and sizes[-1] > 12 * middle:
        axes.set_xscale("symlog", linthresh=float(f"{middle:.0e}"))
    axes.axvline(0, color=LINE, linewidth=1)
    axes.grid(axis="y", linewidth=0.5)
    axes.tick_params(length=0)
    axes.set_xlabel(label)


def inline(svg: str, labels: tuple[str, str]) -> str:
    """The <svg> element alone, in the page's colors and fonts, as wide as the page lets it, with a label."""
    svg = svg[svg.index("<svg") :].strip()
    for color, variable in COLORS.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis)_\d+"', "", svg)
    size = re.search(r'<svg[^>]*?(width="[^"]*")', svg, re.S)
    label = f'role="img" aria-label="{labels[0]} and {labels[1]}"'
    svg = svg.replace(size[1], label, 1) if size else svg
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
