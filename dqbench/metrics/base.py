"""What a metric is, and what a metrics config node must offer. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Z_95 = 1.96  # normal quantile of a two-sided 95 % interval


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scorer(Protocol):
    """What `conf/metrics/*.yaml` builds. `samples` is one array, [N, ...], possibly memory-mapped.

    `reference` names real data, a registered data set or a folder (None: the model has none); what is computed of it
    is kept under `cache_dir`.
    """

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError, before anything is sampled, if scoring could not work."""

    def score(self, samples: np.ndarray, reference: str | None, cache_dir: Path) -> dict[str, Metric]: ...

    def reference_hash(self, reference: str | None, cache_dir: Path) -> str | None:
        """Identity of the reference statistics (data and extractor), recorded in the row; None if there are none."""


@dataclass
class NoScorer:
    """Nothing but the paired metrics, which need no reference data."""

    version: int

    def check(self, reference: str | None, num_samples: int) -> None:
        pass

    def score(self, samples: np.ndarray, reference: str | None, cache_dir: Path) -> dict[str, Metric]:
        return {}

    def reference_hash(self, reference: str | None, cache_dir: Path) -> None:
        return None
