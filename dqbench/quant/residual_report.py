"""What a two-stage quantization shows of its layers: sparsity of both stages, stored bits, errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqbench.diagnostics import curves
from dqbench.quant.residual_acts import Meter


@dataclass(frozen=True)
class Report:
    """What was found of one layer's weight."""

    error: float  # mean squared, relative to the weight
    zeros: float  # shares of the elements
    residual: float
    bits: float  # stored, per weight


def diagnostics(reports: Mapping[str, Report], meters: Mapping[str, Meter]) -> dict[str, Any]:
    """Groups of curves over the layers: sparsity of both stages, stored bits, and the weights' error."""
    groups = {}
    if reports:
        found, x = list(reports.values()), range(len(reports))
        sparsity = {"stage 1": [item.zeros for item in found], "residual": [1 - item.residual for item in found]}
        groups["weights: share of zeros"] = curves(x, sparsity, x_label="layer")
        groups["weights: stored bits"] = curves(x, {"per weight": [item.bits for item in found]}, x_label="layer")
        error = {"mean squared, relative": [item.error for item in found]}
        groups["weights: error"] = curves(x, error, x_label="layer", log=all(item.error > 0 for item in found))
    if meters:
        found, x = list(meters.values()), range(len(meters))
        sparsity = {
            "stage 1": [item.zeros / item.elements for item in found],
            "residual": [1 - item.entries / item.elements for item in found],
        }
        groups["activations: share of zeros"] = curves(x, sparsity, x_label="layer")
        overhead = {"residual, per element": [item.overhead_bits for item in found]}
        groups["activations: stored bits"] = curves(x, overhead, x_label="layer")
    return groups
