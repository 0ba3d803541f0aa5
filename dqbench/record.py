"""The row of a cell: what its stages left on disk, compared with full precision, billed and stamped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dqbench import cost
from dqbench.config import identity, run_id
from dqbench.diagnostics import mean_over_chains, noise_error_curves, save_curves, save_grid
from dqbench.metrics.base import Metric, difference
from dqbench.metrics.paired import paired
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
    noise_error: Artifact | None

    def named(self) -> dict[str, Artifact]:
        """Those that there are, by what they made."""
        named = {"calibration": self.calib, **self.quantized.parts, "samples": self.samples, "scores": self.scores}
        named |= {"fp32_samples": self.reference, "fp32_scores": self.reference_scores, "noise_error": self.noise_error}
        return {name: artifact for name, artifact in named.items() if artifact is not None}


def record(cell: Cell, stages: Stages) -> Row:
    """Compare, bill, stamp."""
    scores, full = read_metrics(stages.scores), read_metrics(stages.reference_scores)
    quantized = stages.noise_error is not None
    return Row(
        run_id=run_id(cell.cfg),
        config=identity(cell.cfg),
        metrics={name: metric.to_dict() for name, metric in scores.items()},
        reference={name: metric.to_dict() for name, metric in full.items()},
        difference={name: difference(metric, full[name]) for name, metric in scores.items()} if quantized else {},
        paired=compare(stages),
        cost=bill(cell, stages.quantized),
        timing=timing(stages),
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


def compare(stages: Stages) -> dict[str, Any]:
    """Paired metrics against full precision on the same seeds; none for full precision."""
    if stages.noise_error is None:
        return {}
    images = (Shards(part.folder, "sample").read() for part in (stages.samples, stages.reference))
    found = {**paired(*images), "noise_error": mean_over_chains(np.load(stages.noise_error.folder / "errors.npy"))}
    return {name: metric.to_dict() for name, metric in found.items()}


def diagnose(cell: Cell, stages: Stages) -> dict[str, Any]:
    """Curves over the sampling steps: the error of the predicted noise, and what the method has to show."""
    if stages.noise_error is None:
        return {}
    errors, timestep = (np.load(stages.noise_error.folder / f"{name}.npy") for name in ("errors", "timestep"))
    return {"noise error": noise_error_curves(errors, timestep), **cell.diagnostics(stages.quantized)}


def bill(cell: Cell, quantized: Quantized) -> dict[str, Any]:
    """The bill of the denoiser as it was really quantized, at the size that was really loaded."""
    network, student = denoiser(cell.pipe), denoiser(cell.load(quantized))
    plan, bits = installed(student, cell.bits)
    found = cost.layers(network, input_shapes(cell.model, network.config))
    return asdict(cost.cost(found, plan, bits, attention_groups(student)))


def timing(stages: Stages) -> dict[str, float]:
    """Seconds each stage took when it was computed, by this cell or by the one that shares it; peak bytes of this run.

    resumed_stages: how many of them continued a killed attempt, whose own seconds are not counted.
    """
    return {
        "calibrate_s": stages.calib.seconds if stages.calib else 0.0,
        "quantize_s": round(sum(part.seconds for part in stages.quantized.parts.values()), 3),
        "generate_s": stages.samples.seconds,
        "score_s": stages.scores.seconds,
        "resumed_stages": sum(artifact.resumed for artifact in stages.named().values()),
        "peak_memory_bytes": peak_memory(),
    }


def picture(row: Row, stages: Stages, folder: Path) -> None:
    """The first samples as a PNG, full precision above, quantized below; and the curves of the diagnostics."""
    full, own = (Shards(part.folder, "sample").read() for part in (stages.reference, stages.samples))
    save_grid(full, own if stages.noise_error else None, folder / "samples.png")
    if row.diagnostics:
        save_curves(row.diagnostics, folder / "curves.png")


def read_metrics(scores: Artifact) -> dict[str, Metric]:
    """The metrics of a sample set with their resamples."""
    found = json.loads((scores.folder / "metrics.json").read_text())
    return {name: Metric(**metric) for name, metric in found.items()}


def write_json(path: Path, content: Any) -> None:
    """Write JSON; an artifact's folder becomes visible only when complete, so this need not be atomic."""
    path.write_text(json.dumps(content, allow_nan=False))
