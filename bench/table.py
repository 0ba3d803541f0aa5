"""What a ratio is, its target, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import process_time

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

AT_LEAST, AT_MOST = "≥", "≤"


@dataclass
class Ratio:
    """One line: what is compared, its value, the target with its direction (None: shown for information)."""

    what: str
    value: float
    direction: str
    target: float | None
    detail: str

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        reached = self.value >= self.target if self.direction == AT_LEAST else self.value <= self.target
        return "reached" if reached else "missed"

    def to_dict(self) -> dict:
        return {**vars(self), "verdict": self.verdict}


def show(ratios: Sequence[Ratio], title: str, console: Console) -> None:
    """Print the ratios of one run."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.add_column("ratio")
    table.add_column("value", justify="right")
    table.add_column("target", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("medians", style="dim")
    for ratio in ratios:
        target = "" if ratio.target is None else f"{ratio.direction} {ratio.target:g}"
        style = {"reached": "green", "missed": "red"}.get(ratio.verdict, "")
        table.add_row(ratio.what, f"{ratio.value:.2f}", target, Text(ratio.verdict, style=style), ratio.detail)
    console.print(table)


def interleave(rounds: int, **contestants: Callable[[], list[float]]) -> dict[str, float]:
    """Median seconds of each contestant, which take turns; each turn returns the seconds of its repetitions."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, turn in contestants.items():
            seconds[name] += turn()
    return {name: median(values) for name, values in seconds.items()}


def timed(action: Callable[[], object], repetitions: int = 1) -> list[float]:
    """CPU seconds of each repetition."""
    seconds = []
    for _ in range(repetitions):
        start = process_time()
        action()
        seconds.append(process_time() - start)
    return seconds
