"""config -> row. Every arrow of the sentence is one line of run(), and one artifact on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from omegaconf import DictConfig, OmegaConf

from dqbench import processes
from dqbench.calibration import CalibrationSet
from dqbench.config import build, compose
from dqbench.identity import THROUGHPUT, digest, hashed, plain, run_id, without
from dqbench.launching.checks import check
from dqbench.launching.preflight import choose_device, meet, preflight
from dqbench.methods.fp32 import FP32
from dqbench.metrics.base import Metric
from dqbench.modality import check_modality, modality_of
from dqbench.models import checkpoint_hash, denoiser, load, read_prompts
from dqbench.noise_statistics import collect, estimate, statistics_seeds
from dqbench.provenance import stamp
from dqbench.quant.checkpoint import load_denoiser, save_denoiser
from dqbench.record import Stages, picture, record, write_json
from dqbench.resources import full_float32, peak_memory, repeatable, restart_peak, set_threads
from dqbench.results import Row, finished
from dqbench.sampling import set_sampler
from dqbench.shards import Shards, fill
from dqbench.stages import Artifact, Store, checksums, taking_turns


def run(cfg: DictConfig, folder: Path | None = None) -> Row:
    """One cell: from its resolved config to its row. What other cells have computed already is read, not computed.

    `folder`, where given, gets the pictures and then the row. Several processes (processes.py) divide the work.
    """
    restart_peak()
    cell = Cell(cfg)
    calib = cell.calibrate()
    quantized = cell.quantize(calib)
    samples, reference = cell.generate(quantized), cell.generate(cell.full_precision)
    scores, reference_scores = cell.score(samples, quantized), cell.score(reference, cell.full_precision)
    error = cell.network_error(quantized)
    stages = Stages(calib, quantized, samples, reference, scores, reference_scores, error)
    peak = processes.largest(peak_memory())
    return processes.agreed(lambda: conclude(cell, stages, peak, folder))


def conclude(cell: Cell, stages: Stages, peak: int, folder: Path | None) -> Row:
    """The row of finished stages, and what is written of it."""
    row = record(cell, stages, peak)
    if folder is not None:
        picture(cell, row, stages, folder)
        row.write(folder)
    return row


@dataclass(frozen=True)
class Quantized:
    """A quantized denoiser on disk, and the statistics that correct the sampler for it; full precision has neither."""

    base: Artifact | None = None
    refined: Artifact | None = None  # what a method that builds on a base made of it
    statistics: Artifact | None = None
    correction: str | None = None  # digest of how the statistics are used

    @property
    def denoiser(self) -> Artifact | None:
        """The last one."""
        return self.refined or self.base

    @property
    def parts(self) -> dict[str, Artifact]:
        """The artifacts it consists of, by name."""
        named = {"quantized": self.base, "refined": self.refined, "statistics": self.statistics}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def key(self) -> list[str | None]:
        """What its samples depend on."""
        return [self.denoiser and self.denoiser.key, self.statistics and self.statistics.key, self.correction]


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
        self.seed, self.full_precision, self.modality = self.cfg.seed, Quantized(), modality_of(self.model)
        check_modality(self)
        self.metrics.check(self.model.data, self.sampler.num_samples)
        scheduler = preflight(self.model, self.sampler, self.cfg.runtime.device)
        for method in (self.method, getattr(self.method, "base", None)):
            if hasattr(method, "check"):
                method.check(self.sampler, scheduler)
            if hasattr(method, "check_bits"):
                method.check_bits(self.bits)
            if hasattr(method, "check_calib"):
                method.check_calib(self.calib, self.sampler, self.bits)
        self._loaded: tuple[Quantized, DiffusionPipeline] | None = None

    @cached_property
    def device(self) -> str:
        return choose_device(self.cfg.runtime.device)

    @cached_property
    def store(self) -> Store:
        return Store(Path(self.cfg.paths.cache), lambda: stamp(self.device))

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The full-precision pipeline under the cell's sampler; loaded when a stage first needs it."""
        full_float32()
        pipe = set_sampler(load(self.model, self.device), self.sampler)
        set_threads(self.cfg.runtime.threads, denoiser(pipe))
        return pipe

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What every stage depends on: the checkpoint's content and how the sampler steps."""
        sampler = without(plain(self.cfg.sampler), (*THROUGHPUT["sampler"], "num_samples"))
        family = {
            key: plain(self.cfg.model)[key] for key in ("version", "pipeline", "denoiser", "dtype", "num_classes")
        }
        family["prompts"] = digest(read_prompts(self.model))
        return {"checkpoint": checkpoint_hash(self.model), "model": family, "sampler": sampler, "seed": self.seed}

    def calibrate(self) -> Artifact | None:
        """The calibration set; None where nothing is quantized."""
        return self.modality.calibrate(self) if self.quantizing else None

    @property
    def quantizing(self) -> bool:
        """Whether the method is more than full precision."""
        return not isinstance(self.method, FP32)

    @property
    def picked(self) -> dict[str, Any]:
        """What the calibration set depends on in calib."""
        return {key: value for key, value in hashed("calib", self.cfg.calib).items() if key != "batch_size"}

    def quantize(self, calib: Artifact | None) -> Quantized:
        """The method's denoiser; where a method builds on another, that one's (shared), refined and corrected."""
        if calib is None:
            return self.full_precision
        if not hasattr(self.method, "base"):
            return Quantized(self.network(calib, self.cfg.method, self.method))
        base = self.network(calib, self.cfg.method.base, self.method.base)
        refined = self.refine(base, calib) if self.method.refining else None
        last = refined or base
        if not self.method.correcting:
            return Quantized(base, refined)
        return Quantized(base, refined, self.statistics(last), digest(self.method.correcting))

    def refine(self, base: Artifact, calib: Artifact) -> Artifact:
        """The base's denoiser as the method changes it."""
        depends = {**self.origin, "base": base.key, "method": self.method.refining}

        def make(rows: CalibrationSet) -> DiffusionPipeline:
            return self.method.refine(self.pipe, self.load(Quantized(base)), rows, self.bits)

        return self.artifact(depends, make, calib)

    def network(self, calib: Artifact, node: DictConfig, method: Any) -> Artifact:
        """The denoiser that one method makes of the full-precision one."""
        patterns = ("units", "official_order", "shortcuts", "time_embedding")
        family = {key: plain(self.cfg.model)[key] for key in patterns}
        depends = {**self.origin, "family": family, "method": plain(node)}
        together = getattr(method, "together", False)
        return self.artifact(depends, lambda rows: method(self.pipe, rows, self.bits), calib, together)

    def artifact(
        self,
        depends: dict[str, Any],
        make: Callable[[CalibrationSet], DiffusionPipeline],
        calib: Artifact,
        together: bool = False,
    ) -> Artifact:
        """The denoiser that `make` returns for the calibration set."""
        size = self.calib.batch_size

        def produce(folder: Path) -> None:
            rows = CalibrationSet.open(calib.folder, self.seed, size, getattr(torch, self.model.dtype))
            with repeatable(self.cfg.runtime.threads, denoiser(self.pipe)):
                made = make(rows)
            if processes.is_main():
                save_denoiser(made, folder)

        depends = {**depends, "calibration": calib.key, "calibration_batch": size, "bits": plain(self.cfg.bits)}
        return self.store.get("quantized", depends, produce, together)

    def statistics(self, quantized: Artifact) -> Artifact:
        """How a quantized denoiser's predicted noise differs from full precision's, along chains of its own."""

        def produce(folder: Path) -> None:
            student = self.load(Quantized(quantized))
            seeds = partial(statistics_seeds, seed=self.seed)
            collect(self.pipe, student, self.sampler, self.method.chains, seeds, folder)

        depends = {**self.origin, "quantized": quantized.key, "chains": self.method.chains}
        return self.store.get("statistics", depends, produce, together=True)

    def diagnostics(self, quantized: Quantized) -> dict[str, Any]:
        """Groups of curves that the method has to show beside its numbers."""
        shown = dict(getattr(denoiser(self.load(quantized)), "diagnostics", {}))
        if quantized.statistics is not None:
            shown |= self.method.curves(self.pipe, estimate(quantized.statistics.folder, self.method.estimator))
        return shown

    def load(self, quantized: Quantized) -> DiffusionPipeline:
        """The pipeline that a stage's denoiser belongs to, kept until another one is asked for."""
        if quantized.denoiser is None:
            return self.pipe
        if self._loaded is None or self._loaded[0] != quantized:
            pipe = load_denoiser(self.pipe, quantized.denoiser.folder)
            if quantized.statistics is not None:
                pipe = self.method.correct(pipe, estimate(quantized.statistics.folder, self.method.estimator))
            self._loaded = (quantized, pipe)
        return self._loaded[1]

    def generate(self, quantized: Quantized) -> Artifact:
        """Samples in shards; sample i depends on its seed alone."""
        count = self.sampler.num_samples

        def produce(folder: Path) -> None:
            pipe = self.load(quantized)
            title = "quantized samples" if quantized.denoiser else "fp32 samples"
            fill(folder, count, self.sampler.batch_size, lambda rows: self.modality.sample(self, pipe, rows), title)
            processes.agreed(lambda: self.modality.check_samples(Shards(folder, "sample").read()))

        depends = {**self.origin, "quantized": quantized.key, "num_samples": count}
        return self.store.get("samples", depends, produce, together=True)

    def score(self, samples: Artifact, quantized: Quantized) -> Artifact:
        """The metrics of a sample set against real data, and of the network that made it where a metric asks for it."""

        def produce(folder: Path) -> None:
            scores = processes.agreed(lambda: self.score_samples(samples))
            if asks_network:
                scores |= self.metrics.score_network(self.load(quantized), self.model)
            if processes.is_main():
                write_json(folder / "metrics.json", {name: asdict(metric) for name, metric in scores.items()})

        asks_network = hasattr(self.metrics, "score_network")
        metrics = without(plain(self.cfg.metrics), (*THROUGHPUT["metrics"], "weights"))
        depends = {"samples": samples.key, "metrics": metrics, "weights": self.metrics.weights_hash()}
        return self.store.get("scores", {**depends, "reference": self.reference_hash}, produce, together=asks_network)

    def score_samples(self, samples: Artifact) -> dict[str, Metric]:
        """The metrics of a sample set against real data."""
        made = Shards(samples.folder, "sample").read()
        return self.metrics.score(made, self.model.data, self.references, device=self.device)

    @cached_property
    def reference_hash(self) -> str | None:
        """Of the statistics of real data that samples are scored against."""
        return processes.agreed(
            lambda: self.metrics.reference_hash(self.model.data, self.references, device=self.device)
        )

    @property
    def references(self) -> Path:
        """Where statistics of real data are kept."""
        return self.store.root / "reference"

    @cached_property
    def data_hash(self) -> str | None:
        """What the calibration set depends on beside the trajectory: the real images, where it is made of them."""
        if self.calib.source not in ("image", "train_mimic") or self.model.data is None:
            return None
        folder = Path(self.model.data).expanduser()
        return digest(checksums(folder)) if folder.is_dir() else self.model.data

    def network_error(self, quantized: Quantized) -> Artifact | None:
        """How far the quantized network's own predictions are from full precision's; None for full precision."""
        return self.modality.network_error(self, quantized) if quantized.denoiser else None


class _Callable(ModuleType):
    """Lets `dqbench.run([...])` be a call although dqbench.run is this module."""

    def __call__(self, overrides: Sequence[str] = ()) -> Row:
        """One cell, as `python -m dqbench` with these overrides; a finished row is read, not computed again."""
        cfg = compose(list(overrides))
        meet(cfg.runtime.device)
        folder = Path(cfg.paths.results) / "runs" / run_id(cfg)
        with taking_turns(Path(cfg.paths.cache), f"run-{folder.name}"):
            row = None if cfg.runtime.force else processes.agreed(lambda: finished(folder))
            if row is not None:
                return row
            folder.mkdir(parents=True, exist_ok=True)
            return run(cfg, folder)


sys.modules[__name__].__class__ = _Callable
