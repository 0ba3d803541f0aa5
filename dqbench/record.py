"""The row of a cell: what its stages left on disk, compared with full precision, billed and stamped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqbench import cost
from dqbench.diagnostics import save_curves
from dqbench.identity import identity, run_id
from dqbench.metrics.base import Metric, difference
from dqbench.models import denoiser, input_shapes
from dqbench.provenance import provenance, stamp
from dqbench.quant.attach import installed
from dqbench.quant.attention import attention_groups
from dqbench.resources import peak_memory
from dqbench.results import Row
from dqbench.shards import Shards

if TYPE_CHECKING:
    from dqbench.run import Cell, Quantized
    from dqbench.stages import Artifact


@dataclass(frozen=True)
class Stages:
    """The artifacts of a finished cell; `reference` and `reference_scores` are full precision's own."""

    calib: Artifact | None
    quantized: Quantized
    samples: Artifact
    reference: Artifact
    scores: Artifact
    reference_scores: Artifact
    error: Artifact | None  # of the quantized network's predictions

    def named(self) -> dict[str, Artifact]:
        """Those that there are, by what they made."""
        named = {"calibration": self.calib, **self.quantized.parts, "samples": self.samples, "scores": self.scores}
        named |= {"fp32_samples": self.reference, "fp32_scores": self.reference_scores, "network_error": self.error}
        return {name: artifact for name, artifact in named.items() if artifact is not None}


def record(cell: Cell, stages: Stages, peak: int) -> Row:
    """Compare, bill, stamp. peak: the most memory, in bytes, that any process of the run has used so far."""
    scores, full = read_metrics(stages.scores), read_metrics(stages.reference_scores)
    quantized = stages.error is not None
    return Row(
        run_id=run_id(cell.cfg),
        config=identity(cell.cfg),
        metrics={name: metric.to_dict() for name, metric in scores.items()},
        reference={name: metric.to_dict() for name, metric in full.items()},
        difference={name: difference(metric, full[name]) for name, metric in scores.items()} if quantized else {},
        paired=compare(cell, stages),
        cost=bill(cell, stages.quantized),
        timing=timing(stages, peak),
        provenance=provenance(
            cell.device,
            cell.model.dtype,
            cell.origin["checkpoint"],
            cell.reference_hash,
            cell.metrics.weights_hash(),
            {"row": stamp(cell.device), **{name: artifact.stamp for name, artifact in stages.named().items()}},
        ),
        diagnostics=diagnose(cell, stages),
    )


def compare(cell: Cell, stages: Stages) -> dict[str, Any]:
    """Paired metrics against full precision on the same seeds; none for full precision."""
    if stages.error is None:
        return {}
    samples, reference = (Shards(part.folder, "sample").read() for part in (stages.samples, stages.reference))
    found = cell.modality.compare(samples, reference, stages.error)
    return {name: metric.to_dict() for name, metric in found.items()}


def diagnose(cell: Cell, stages: Stages) -> dict[str, Any]:
    """Curves: the error of the network's predictions, and what the method has to show."""
    if stages.error is None:
        return {}
    return {**cell.modality.error_curves(stages.error), **cell.diagnostics(stages.quantized)}


def bill(cell: Cell, quantized: Quantized) -> dict[str, Any]:
    """The bill of the denoiser as it was really quantized, at the size that was really loaded."""
    network, student = denoiser(cell.pipe), denoiser(cell.load(quantized))
    plan, bits = installed(student, cell.bits)
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else network.config
    found = cost.layers(network, input_shapes(cell.model, config))
    return asdict(cost.cost(found, plan, bits, attention_groups(student), cell.model.dtype))


def timing(stages: Stages, peak: int) -> dict[str, float]:
    """Seconds each stage took when it was computed, by this cell or by the one that shares it; peak bytes of this run.

    With several processes: from the main one's start of a stage to the last one's end; the largest process's peak.
    resumed_stages: how many of them continued a killed attempt, whose own seconds are not counted.
    """
    return {
        "calibrate_s": stages.calib.seconds if stages.calib else 0.0,
        "quantize_s": round(sum(part.seconds for part in stages.quantized.parts.values()), 3),
        "generate_s": stages.samples.seconds,
        "score_s": stages.scores.seconds,
        "resumed_stages": sum(artifact.resumed for artifact in stages.named().values()),
        "peak_memory_bytes": max(peak, peak_memory()),
    }


def picture(cell: Cell, row: Row, stages: Stages, folder: Path) -> None:
    """The first samples, and the curves of the diagnostics."""
    cell.modality.picture(cell, stages, folder)
    if row.diagnostics:
        save_curves(row.diagnostics, folder / "curves.png")


def read_metrics(scores: Artifact) -> dict[str, Metric]:
    """The metrics of a sample set with their resamples."""
    found = json.loads((scores.folder / "metrics.json").read_text())
    return {name: Metric(**metric) for name, metric in found.items()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON; an artifact's folder becomes visible only when complete, so this need not be atomic."""
    path.write_text(json.dumps(content, allow_nan=False))
