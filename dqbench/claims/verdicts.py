"""Paired t tests over seeds: each metric of each comparison, on whatever rows there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dqbench.claims.book import Comparison, series
from dqbench.errors import UserError
from dqbench.results import Row

LEVEL = 0.05
ROUNDING = 1e-12  # of the largest value: differences that vary by less are equal
SHOWN, NOT_SHOWN, CONTRARY, NOT_RUN = VERDICTS = ("shown", "not shown", "contrary", "not run")
Series = Mapping[int, Row]  # rows by seed


@dataclass(frozen=True)
class Effect:
    """One metric of a comparison. Differences are treatment - control, seed by seed; low, high: 95 % t interval.

    p: one-sided, of the claimed direction; None where differences do not vary at all, and where nothing was run.
    p_holm: two-sided, Holm's correction over all tests.
    """

    metric: str
    higher_is_better: bool | None = None
    treatment: float | None = None  # means over seeds
    control: float | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str = NOT_RUN


@dataclass(frozen=True)
class Result:
    """A comparison with its effects, on the rows of the seeds that both sides have."""

    comparison: Comparison
    treatment: Series
    control: Series
    effects: list[Effect]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.treatment)

    @property
    def verdict(self) -> str:
        """That of the claim's first metric."""
        return self.effects[0].verdict


def judge(comparisons: Sequence[Comparison], rows: Sequence[Row]) -> list[Result]:
    """Every comparison on the rows, p values corrected together."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(series(row.config), {})[row.config["seed"]] = row
    results = [pair(comparison, found) for comparison in comparisons]
    corrected = iter(holm([two_sided(effect.p) for result in results for effect in result.effects]))
    return [
        replace(result, effects=[replace(effect, p_holm=next(corrected)) for effect in result.effects])
        for result in results
    ]


def pair(comparison: Comparison, found: Mapping[str, Series]) -> Result:
    """The comparison on the seeds that both sides have."""
    treatment, control = (found.get(key, {}) for key in (comparison.treatment, comparison.control))
    seeds = sorted(treatment.keys() & control.keys())
    sides = [{seed: side[seed] for seed in seeds} for side in (treatment, control)]
    return Result(comparison, *sides, [evaluate(comparison, name, *sides) for name in comparison.claim.metrics])


def evaluate(comparison: Comparison, name: str, treatment: Series, control: Series) -> Effect:
    """One metric; not run with fewer seeds than the claim needs, nor where the sides have unequal n."""
    if len(treatment) < comparison.claim.seeds:
        return Effect(name)
    metrics = [[measured(comparison, name, row) for row in side.values()] for side in (treatment, control)]
    if len({metric.get("n") for side in metrics for metric in side}) > 1:
        return Effect(name)
    higher = bool(metrics[0][0]["higher_is_better"])
    return t_test(name, higher, *([metric["value"] for metric in side] for side in metrics))


def measured(comparison: Comparison, name: str, row: Row) -> Mapping[str, Any]:
    """A row's metric; UserError, which names the claim, where it has none of that name."""
    known = row.metrics | row.paired
    if name not in known:
        line = f"claim {comparison.claim.id}: run {row.run_id} has no metric {name}; there: {', '.join(known)}"
        raise UserError(line)
    return known[name]


def t_test(name: str, higher: bool, treatment: Sequence[float], control: Sequence[float]) -> Effect:
    """treatment, control: values of the same seeds in the same order."""
    from scipy import stats

    means = [math.fsum(side) / len(side) for side in (treatment, control)]
    differences = [one - other for one, other in zip(treatment, control, strict=True)]
    effect = math.fsum(differences) / len(differences)
    if max(differences) - min(differences) <= ROUNDING * max(map(abs, (*treatment, *control))):
        return Effect(name, higher, *means, effect, effect, effect, None, None, NOT_SHOWN)
    low, high = stats.ttest_rel(treatment, control).confidence_interval(0.95)
    p = float(stats.ttest_rel(treatment, control, alternative="greater" if higher else "less").pvalue)
    return Effect(name, higher, *means, effect, float(low), float(high), p, None, verdict_of(p))


def verdict_of(p: float) -> str:
    """p: one-sided, of the claimed direction."""
    return SHOWN if p < LEVEL else CONTRARY if 1 - p < LEVEL else NOT_SHOWN


def two_sided(p: float | None) -> float | None:
    return None if p is None else 2 * min(p, 1 - p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of p values; those that are None stay so and do not count."""
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[index] = highest
    return corrected
