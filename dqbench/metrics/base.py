"""What a metric is, and what a metrics config node must offer. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@functools.cache
def t_95(count: int) -> float:
    """Student's t quantile of a two-sided 95 % interval, where `count` >= 2 values gave the standard error."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean of at least two values and the half-width of its 95 % interval: t s / sqrt(n)."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(t_95(len(values)) * values.std(ddof=1) / len(values) ** 0.5)


@dataclass(frozen=True)
class Metric:
    """A number that can be defended: its 95 % interval, how many samples, what looked at them, by which protocol."""

    value: float
    low: float
    high: float
    n: int
    extractor: str
    protocol: str
    higher_is_better: bool
    resamples: tuple[float, ...] = ()  # its values on bootstrap resamples; the b-th redraws the same rows in every set

    def to_dict(self) -> dict[str, Any]:
        """What a row keeps: all but the resamples."""
        return {key: value for key, value in asdict(self).items() if key != "resamples"}


def difference(metric: Metric, reference: Metric) -> dict[str, float]:
    """metric - reference with its 95 % interval by the paired bootstrap: both sets redraw the same seeds.

    Without resamples, as of an external harness, the two intervals are taken as independent, which is wider.
    """
    delta = metric.value - reference.value
    if metric.resamples:
        deltas = np.subtract(metric.resamples, reference.resamples)
        half = float(t_95(len(deltas)) * deltas.std(ddof=1))
    else:
        half = float(np.hypot(metric.high - metric.low, reference.high - reference.low)) / 2
    return {"value": delta, "low": delta - half, "high": delta + half}


class Scorer(Protocol):
    """What `conf/metrics/*.yaml` builds. `samples` is one array, [N, ...], possibly memory-mapped.

    `reference` names real data, a registered data set or a folder (None: the model has none); what is computed of it
    is kept under `cache_dir`. `device` is where features are computed.
    """

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError, before anything is sampled, if scoring could not work."""

    def score(
        self, samples: np.ndarray, reference: str | None, cache_dir: Path, *, device: str = "cpu"
    ) -> dict[str, Metric]: ...

    def reference_hash(self, reference: str | None, cache_dir: Path, *, device: str = "cpu") -> str | None:
        """Identity of the reference statistics (data and extractor), recorded in the row; None if there are none."""

    def weights_hash(self) -> str | None:
        """Hash of the content of the extractor's weights, wherever they lie; None if there are none."""


@dataclass
class NoScorer:
    """Nothing but the paired metrics, which need no reference data."""

    version: int

    modalities = ("image", "text")

    def check(self, reference: str | None, num_samples: int) -> None:
        pass

    def score(
        self, samples: np.ndarray, reference: str | None, cache_dir: Path, *, device: str = "cpu"
    ) -> dict[str, Metric]:
        return {}

    def reference_hash(self, reference: str | None, cache_dir: Path, *, device: str = "cpu") -> None:
        return None

    def weights_hash(self) -> None:
        return None
