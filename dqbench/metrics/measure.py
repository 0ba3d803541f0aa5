"""From features to metrics: which statistics, of which layer, under which name, with which interval."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dqbench.errors import UserError
from dqbench.metrics.base import Metric, t_95
from dqbench.metrics.guards import DegenerateSamples

MIN_SAMPLES = 8  # fewer leave no neighborhoods, splits or intervals worth the name

Values = tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """A statistic: `compute(features [N, D], prepare(reference features [M, D]), **options)`."""

    compute: Callable[..., Values]
    higher_is_better: bool
    prepare: Callable[[Tensor], Any] = lambda reference: reference


@dataclass
class Statistic:
    """One entry of `statistics` in conf/metrics/*.yaml."""

    kind: str
    layer: str  # features that it looks at
    names: list[str]  # of the metrics that it gives
    bootstrap: int  # resamples behind the interval
    options: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """A set of statistics and what their metrics say about themselves."""

    statistics: Mapping[str, Statistic]
    kinds: Mapping[str, Kind]
    extractor: str
    protocol: str
    seed: int

    @property
    def layers(self) -> list[str]:
        """The feature layers that are needed, each once."""
        return sorted({statistic.layer for statistic in self.statistics.values()})

    def check(self, provided_layers: Collection[str], num_samples: int) -> None:
        """Raise UserError for statistics that could not be computed."""
        if num_samples < MIN_SAMPLES:
            raise UserError(f"{num_samples} samples are too few to score: at least {MIN_SAMPLES}, or metrics=none")
        for key, statistic in self.statistics.items():
            _check_statistic(f"metrics.statistics.{key}", statistic, self.kinds, provided_layers)

    def measure(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Every metric by name, from features {layer: [N, D]} and {layer: [M, D]}."""
        metrics: dict[str, Metric] = {}
        for statistic in self.statistics.values():
            metrics |= self._measure_one(statistic, generated[statistic.layer], reference[statistic.layer])
        return metrics

    def _measure_one(self, statistic: Statistic, features: Tensor, reference: Tensor) -> dict[str, Metric]:
        kind = self.kinds[statistic.kind]
        prepared = kind.prepare(reference)

        def compute(features: Tensor) -> Values:
            return kind.compute(features, prepared, **statistic.options)

        values = compute(features)
        draws = resample(compute, features, statistic.bootstrap, self.seed)
        common = {
            "n": len(features),
            "extractor": f"{self.extractor}/{statistic.layer}",
            "protocol": self._describe(statistic, len(reference)),
            "higher_is_better": kind.higher_is_better,
        }
        return {
            name: _metric(name, value, own, common)
            for name, value, own in zip(statistic.names, values, draws.T, strict=True)
        }

    def _describe(self, statistic: Statistic, num_reference: int) -> str:
        options = "".join(f", {key} {value}" for key, value in statistic.options.items())
        interval = f"interval +-t standard errors, {statistic.bootstrap} bootstrap resamples"
        return f"{statistic.kind}{options}; {self.protocol} ({num_reference} images); {interval}"


def resample(compute: Callable[[Tensor], Values], features: Tensor, resamples: int, seed: int) -> np.ndarray:
    """`compute` on samples redrawn with replacement: [resamples, values]. Sets of equal size redraw the same rows.

    Intervals are the estimate +-t of the draws' standard deviation, t Student's quantile: few draws estimate it
    badly. Percentiles of the draws would not do: a resample repeats samples, which biases distances upwards, so the
    estimate itself would lie below its own percentile interval.
    """
    rng = np.random.default_rng(seed)
    return np.array([compute(features[rng.integers(len(features), size=len(features))]) for _ in range(resamples)])


def _metric(name: str, value: float, draws: np.ndarray, common: Mapping[str, Any]) -> Metric:
    half = t_95(len(draws)) * float(draws.std(ddof=1))
    if not (math.isfinite(value) and math.isfinite(half)):
        raise DegenerateSamples(f"{name} is not finite ({value} +- {half}): the samples' features do not allow it")
    return Metric(value, value - half, value + half, **common, resamples=tuple(draws.tolist()))


def _check_statistic(where: str, statistic: Statistic, kinds: Mapping[str, Kind], layers: Collection[str]) -> None:
    if statistic.kind not in kinds:
        raise UserError(f"{where}.kind={statistic.kind} is unknown; allowed: {', '.join(kinds)}")
    if statistic.layer not in layers:
        raise UserError(f"{where}.layer={statistic.layer} is unknown; allowed: {', '.join(layers)}")
    if statistic.bootstrap < 2:
        raise UserError(f"{where}.bootstrap={statistic.bootstrap} gives no interval; allowed: 2 or more")
    options = list(inspect.signature(kinds[statistic.kind].compute).parameters)[2:]
    if set(options) != set(statistic.options):
        given, needed = ", ".join(statistic.options) or "nothing", ", ".join(options) or "nothing"
        raise UserError(f"{where}.options has {given}; needed: {needed}")
