"""What our rows of a cell say: a metric and its difference from full precision, over seeds, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dqbench.metrics.base import mean_interval
from dqbench.results import Row


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; one seed: the metric's own, several: Student's t over seeds.

    Seeds with the very same value, as where nothing is drawn at random, count once.
    """

    value: float
    low: float
    high: float
    n: int  # samples of a seed
    seeds: int


def measured(row: Row, name: str) -> dict[str, Any] | None:
    """A metric of a row; None where it has none of that name."""
    return (row.metrics | row.paired).get(name)


def estimate(rows: Sequence[Row], name: str | None) -> Estimate | None:
    """A metric of rows that differ by seed alone; None where one of them lacks it."""
    found = [measured(row, name) for row in rows] if name else []
    return over_seeds(found, found[0]["n"]) if found and None not in found else None


def change(rows: Sequence[Row], name: str | None) -> Estimate | None:
    """A metric minus full precision's at the same seed; None where a row does not say it."""
    found = [row.difference.get(name) for row in rows] if name else []
    if not found or None in found:
        return None
    return over_seeds(found, measured(rows[0], name)["n"])


def over_seeds(found: Sequence[dict[str, Any]], n: int) -> Estimate:
    """One interval of those of the seeds."""
    if len({each["value"] for each in found}) == 1:
        return Estimate(*(found[0][key] for key in ("value", "low", "high")), n, 1)
    value, half = mean_interval([each["value"] for each in found])
    return Estimate(value, value - half, value + half, n, len(found))
