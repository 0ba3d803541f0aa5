"""What lm-evaluation-harness reports, as metrics of a row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dqbench.config import build, compose
from dqbench.errors import UserError
from dqbench.metrics.base import difference
from dqbench.text import harness_metrics

RESULTS = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01, "bleu,none": 3.0, "x,none": "N/A"}
    },
    "n-samples": {"piqa": {"original": 100, "effective": 40}},
}


def scorer(*overrides: str) -> harness_metrics.HarnessMetrics:
    return build(compose(["model=llada_8b_base", *overrides]).metrics)


def test_measures_with_a_standard_error_are_metrics(monkeypatch):
    asked = []

    def evaluate(pipe, protocol, tasks, **options):
        asked.append((protocol.draws, tasks, options))
        return RESULTS

    monkeypatch.setattr(harness_metrics, "evaluate", evaluate)
    own = scorer("~metrics.tasks", "+metrics.tasks={piqa: 5}", "metrics.limit=40")
    found = own.score_network(None, None)
    assert asked == [(128, ["piqa"], {"num_fewshot": 5, "limit": 40})] and set(found) == {"piqa_acc"}
    metric = found["piqa_acc"]
    assert (metric.value, metric.n, metric.higher_is_better) == (0.75, 40, True)
    assert metric.high - metric.value == pytest.approx(0.0196) and "5-shot" in metric.protocol
    assert difference(metric, metric)["high"] == pytest.approx(0.0196 * np.sqrt(2))
    assert own.score(np.zeros((2, 2)), None, Path()) == {}


def test_a_missing_harness_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'dqbench\[eval\]'"):
        scorer().check(None, 2)
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    scorer().check(None, 2)
    with pytest.raises(UserError, match="tasks is empty"):
        scorer("~metrics.tasks", "+metrics.tasks={}").check(None, 2)
