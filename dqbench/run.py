"""config -> row. Every arrow of the sentence is one line of run(), and one artifact on disk."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from omegaconf import DictConfig, OmegaConf

from dqbench import cost
from dqbench.calibration import CalibrationSet, calibration_seeds, record_trajectory, select
from dqbench.config import THROUGHPUT, build, compose, digest, identity, plain, run_id
from dqbench.diagnostics import curve, mean_over_chains, noise_errors, save_grid
from dqbench.launching.checks import check
from dqbench.launching.preflight import choose_device, preflight
from dqbench.methods.fp32 import FP32
from dqbench.metrics.guards import check_finite, check_samples
from dqbench.metrics.paired import paired
from dqbench.models import checkpoint_hash, denoiser, load, read_prompts
from dqbench.provenance import provenance
from dqbench.quant.attach import installed
from dqbench.quant.checkpoint import load_denoiser, save_denoiser
from dqbench.results import Row, finished
from dqbench.sampling import generate, sample_seed, set_sampler, to_uint8
from dqbench.shards import Shards, fill
from dqbench.sources import replace_source
from dqbench.stages import Artifact, Store, checksums

SMALL = 10_000_000  # parameters: below, threads wait for each other longer than they compute
PROBE_CHAINS = 64  # scored seeds along whose full-precision trajectory the error of the predicted noise is measured


def run(cfg: DictConfig, folder: Path | None = None) -> Row:
    """One cell: from its resolved config to its row. What other cells have computed already is read, not computed.

    `folder`, where given, gets the picture of samples and then the row.
    """
    cell = Cell(cfg)
    calib = cell.calibrate()
    quantized = cell.quantize(calib)
    reference, samples = cell.generate(cell.full_precision), cell.generate(quantized)
    row = cell.row(calib, quantized, samples, reference)
    if folder is not None:
        cell.picture(samples, reference, folder / "samples.png")
        row.write(folder)
    return row


@dataclass(frozen=True)
class Quantized:
    """A quantized denoiser on disk; None stands for full precision."""

    artifact: Artifact | None


@dataclass
class Cell:
    """The stages of one cell. Each method is an artifact keyed by what it depends on."""

    cfg: DictConfig

    def __post_init__(self) -> None:
        """Raise UserError for what would fail later, before anything heavy is loaded."""
        check(self.cfg)
        self.model, self.sampler, self.calib, self.bits = (
            OmegaConf.to_object(self.cfg[key]) for key in ("model", "sampler", "calib", "bits")
        )
        self.method, self.metrics = build(self.cfg.method), build(self.cfg.metrics)
        self.store = Store(Path(self.cfg.paths.cache))
        self.seed, self.full_precision = self.cfg.seed, Quantized(None)
        self.metrics.check(self.model.data, self.sampler.num_samples)
        preflight(self.model, self.sampler, self.cfg.runtime.device)

    @cached_property
    def device(self) -> str:
        return choose_device(self.cfg.runtime.device)

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The full-precision pipeline under the cell's sampler; loaded when a stage first needs it."""
        pipe = set_sampler(load(self.model, self.device), self.sampler)
        if self.cfg.runtime.threads:
            torch.set_num_threads(self.cfg.runtime.threads)
        elif sum(parameter.numel() for parameter in denoiser(pipe).parameters()) < SMALL:
            torch.set_num_threads(1)
        return pipe

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What every stage depends on: the checkpoint's content and how the sampler steps."""
        unhashed = (*THROUGHPUT["sampler"], "num_samples")
        sampler = {key: value for key, value in plain(self.cfg.sampler).items() if key not in unhashed}
        family = {
            key: plain(self.cfg.model)[key] for key in ("version", "pipeline", "denoiser", "dtype", "num_classes")
        }
        family["prompts"] = digest(read_prompts(self.model))
        return {"checkpoint": checkpoint_hash(self.model), "model": family, "sampler": sampler, "seed": self.seed}

    def trajectory(self, chains: int, purpose: str) -> Artifact:
        """Inputs and outputs of full-precision sampling: calibration chains, or the first scored seeds (probe)."""
        seeds = {
            "calibration": lambda rows: calibration_seeds(rows, self.seed),
            "probe": lambda rows: [sample_seed(self.seed, i) for i in rows],
        }[purpose]
        return self.store.get(
            "trajectory",
            {**self.origin, "chains": chains, "purpose": purpose},
            lambda folder: record_trajectory(self.pipe, self.sampler, chains, seeds, folder),
        )

    def calibrate(self) -> Artifact | None:
        """The calibration set that the policy picks from the shared trajectory; None where nothing is quantized."""
        if isinstance(self.method, FP32):
            return None
        source = self.trajectory(self.calib.chains, "calibration")

        def produce(folder: Path) -> None:
            select(source.folder, self.calib, self.seed, folder)
            if self.calib.source != "trajectory":
                replace_source(self.pipe, self.calib, self.seed, folder)

        depends = {"trajectory": source.key, "calib": plain(self.cfg.calib), "data": self.data_hash, "seed": self.seed}
        artifact = self.store.get("calibration", depends, produce)
        return replace(artifact, seconds=source.seconds + artifact.seconds)

    def quantize(self, calib: Artifact | None) -> Quantized:
        """The method's denoiser."""
        if calib is None:
            return self.full_precision

        def produce(folder: Path) -> None:
            quantized = self.method(self.pipe, CalibrationSet.open(calib.folder, self.seed), self.bits)
            save_denoiser(quantized, folder)

        parts = ("method", "bits")
        family = {key: plain(self.cfg.model)[key] for key in ("units", "official_order", "shortcuts", "time_embedding")}
        depends = {**self.origin, "calibration": calib.key, "family": family}
        return Quantized(self.store.get("quantized", depends | {key: plain(self.cfg[key]) for key in parts}, produce))

    def load(self, quantized: Quantized) -> DiffusionPipeline:
        """The pipeline that a stage's denoiser belongs to."""
        return load_denoiser(self.pipe, quantized.artifact.folder) if quantized.artifact else self.pipe

    def generate(self, quantized: Quantized) -> Artifact:
        """uint8 samples [N, H, W, C] in shards; sample i depends on its seed alone."""
        count = self.sampler.num_samples

        def produce(folder: Path) -> None:
            pipe = self.load(quantized)
            title = "quantized samples" if quantized.artifact else "fp32 samples"

            def batch(rows: range) -> dict[str, np.ndarray]:
                images = generate(pipe, self.sampler, [sample_seed(self.seed, i) for i in rows], rows)
                check_finite(images, rows.start)
                return {"sample": to_uint8(images)}

            fill(folder, count, self.sampler.batch_size, batch, title)
            check_samples(Shards(folder, "sample").read())

        key = quantized.artifact.key if quantized.artifact else None
        return self.store.get("samples", {**self.origin, "quantized": key, "num_samples": count}, produce)

    def score(self, samples: Artifact) -> Artifact:
        """The metrics of a sample set against real data."""

        def produce(folder: Path) -> None:
            images = Shards(samples.folder, "sample").read()
            scores = self.metrics.score(images, self.model.data, self.references)
            write_json(folder / "metrics.json", {name: metric.to_dict() for name, metric in scores.items()})

        reference = self.metrics.reference_hash(self.model.data, self.references)
        depends = {"samples": samples.key, "metrics": plain(self.cfg.metrics), "reference": reference}
        return self.store.get("scores", depends, produce)

    @cached_property
    def data_hash(self) -> str | None:
        """What the calibration set depends on beside the trajectory: the real images, where it is made of them."""
        if self.calib.source not in ("image", "train_mimic") or self.model.data is None:
            return None
        folder = Path(self.model.data).expanduser()
        return digest(checksums(folder)) if folder.is_dir() else self.model.data

    @property
    def references(self) -> Path:
        """Where statistics of real data are kept."""
        return self.store.root / "reference"

    def noise_error(self, quantized: Quantized) -> Artifact:
        """The relative error of the predicted noise along the full-precision trajectory of the first scored seeds."""
        probe = self.trajectory(min(PROBE_CHAINS, self.sampler.num_samples), "probe")

        def produce(folder: Path) -> None:
            errors = noise_errors(self.load(quantized), probe.folder)
            steps = Shards(probe.folder, "timestep")[0][0]
            write_json(
                folder / "errors.json", {"mean": mean_over_chains(errors).to_dict(), "curve": curve(errors, steps)}
            )

        return self.store.get("noise_error", {"probe": probe.key, "quantized": quantized.artifact.key}, produce)

    def row(self, calib: Artifact | None, quantized: Quantized, samples: Artifact, reference: Artifact) -> Row:
        """Score, compare, bill; the sample grid is written beside the row."""
        scores = {part: self.score(part) for part in (samples, reference)}
        paired_metrics, diagnostics = self.compare(quantized, samples, reference)
        return Row(
            run_id=run_id(self.cfg),
            config=identity(self.cfg),
            metrics=read_json(scores[samples].folder / "metrics.json"),
            reference=read_json(scores[reference].folder / "metrics.json"),
            paired=paired_metrics,
            cost=self.cost(quantized),
            timing=self.timing(calib, quantized, samples, scores[samples]),
            provenance=provenance(
                self.device,
                self.model.dtype,
                self.origin["checkpoint"],
                self.metrics.reference_hash(self.model.data, self.references),
            ),
            diagnostics=diagnostics,
        )

    def compare(
        self, quantized: Quantized, samples: Artifact, reference: Artifact
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(paired metrics, per-step curve) against full precision on the same seeds; both empty for full precision."""
        if quantized.artifact is None:
            return {}, {}
        metrics = paired(*(Shards(part.folder, "sample").read() for part in (samples, reference)))
        errors = read_json(self.noise_error(quantized).folder / "errors.json")
        return {**{name: metric.to_dict() for name, metric in metrics.items()}, "noise_error": errors["mean"]}, errors[
            "curve"
        ]

    def cost(self, quantized: Quantized) -> dict[str, Any]:
        """The bill of the denoiser as it was really quantized."""
        network = denoiser(self.load(quantized))
        plan, bits = installed(network, self.bits)
        return asdict(cost.cost(cost.layers(denoiser(self.pipe), self.model.inputs), plan, bits))

    def picture(self, samples: Artifact, reference: Artifact, path: Path) -> None:
        """The first samples as a PNG: full precision above, quantized below."""
        full, own = (Shards(part.folder, "sample").read() for part in (reference, samples))
        save_grid(full, own if samples.folder != reference.folder else None, path)

    def timing(
        self, calib: Artifact | None, quantized: Quantized, samples: Artifact, scores: Artifact
    ) -> dict[str, float]:
        """Seconds each stage took when it was computed, by this cell or by the one that shares it."""
        return {
            "calibrate_s": calib.seconds if calib else 0.0,
            "quantize_s": quantized.artifact.seconds if quantized.artifact else 0.0,
            "generate_s": samples.seconds,
            "score_s": scores.seconds,
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """Peak resident bytes of this process, on the GPU plus on the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write JSON; an artifact's folder becomes visible only when complete, so this need not be atomic."""
    path.write_text(json.dumps(content, allow_nan=False))


class _Callable(ModuleType):
    """Lets `dqbench.run([...])` be a call although dqbench.run is this module."""

    def __call__(self, overrides: Sequence[str] = ()) -> Row:
        """One cell, as `python -m dqbench` with these overrides; a finished row is read, not computed again."""
        cfg = compose(list(overrides))
        folder = Path(cfg.paths.results) / "runs" / run_id(cfg)
        if (row := finished(folder)) is not None and not cfg.runtime.force:
            return row
        folder.mkdir(parents=True, exist_ok=True)
        return run(cfg, folder)


sys.modules[__name__].__class__ = _Callable
