"""What differs between image and language models: how samples are made, compared with full precision's, and shown."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dqbench.config import Calib, Model, Sampler
from dqbench.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dqbench.metrics.base import Metric
    from dqbench.record import Stages
    from dqbench.run import Cell, Quantized
    from dqbench.stages import Artifact

KINDS = {"image": "dqbench.images", "text": "dqbench.text.modality"}  # modules with the functions of Modality
SCORERS = {"image": "metrics=digits, inception, clean_fid or none", "text": "metrics=text or none"}
SAMPLERS = {"image": "sampler=ddim50, ddpm and the like", "text": "sampler=llada8, llada1024, dream512"}
CALIBRATION = {"image": "calib=uniform, every_step or paper", "text": "calib=mcs"}


class Modality(Protocol):
    """A module of KINDS."""

    def check(self, cell: Cell) -> None:
        """Raise UserError, before anything is loaded, where this kind of model could not be sampled or calibrated."""

    def sample(self, cell: Cell, pipe: DiffusionPipeline, rows: range) -> dict[str, np.ndarray]:
        """The samples `rows` as arrays [B, ...], "sample" being what is scored; sample i depends on its seed alone."""

    def check_samples(self, samples: np.ndarray) -> None:
        """Fail on samples that no metric should be computed on."""

    def calibrate(self, cell: Cell) -> Artifact:
        """The calibration set."""

    def network_error(self, cell: Cell, quantized: Quantized) -> Artifact:
        """How far the quantized network's own predictions are from full precision's, at the same inputs."""

    def compare(self, samples: np.ndarray, reference: np.ndarray, error: Artifact) -> dict[str, Metric]:
        """Samples against full precision's of the same seeds, and the network's error."""

    def error_curves(self, error: Artifact) -> dict[str, Any]:
        """The network's error as groups of curves."""

    def picture(self, cell: Cell, stages: Stages, folder: Path) -> None:
        """Write what a person wants to look at into a folder."""


def kind_of(model: Model) -> str:
    """image or text: what the model's pipeline class says it makes."""
    from dqbench.models import locate

    return getattr(locate(model.pipeline), "modality", "image")


def modality_of(model: Model) -> Modality:
    """The module of the model's kind."""
    return importlib.import_module(KINDS[kind_of(model)])


def check_modality(cell: Cell) -> None:
    """Raise UserError for a sampler, method, metrics or calibration that are made for another kind of model.

    Then for whatever else the kind of model does not allow.
    """
    model, kind = cell.model, kind_of(cell.model)
    check_kind(model, cell.method, cell.sampler)
    if kind not in getattr(cell.metrics, "modalities", ("image",)):
        raise UserError(f"these metrics cannot score {kind}; allowed for model={model.name}: {SCORERS[kind]}")
    if cell.quantizing:
        check_calibration(model, cell.calib)
    cell.modality.check(cell)


def check_kind(model: Model, method: Any, sampler: Sampler) -> None:
    """Raise UserError for a method or a sampler that is made for another kind of model."""
    kind, made_for = kind_of(model), getattr(method, "modalities", tuple(KINDS))
    if kind not in made_for:
        raise UserError(f"method={method.name} works on {made_for[0]} models; model={model.name} makes {kind}")
    if kind != ("text" if samples_tokens(sampler) else "image"):
        given = f"sampler.scheduler={sampler.scheduler} does not sample {kind}"
        raise UserError(f"{given}; allowed for model={model.name}: {SAMPLERS[kind]}")


def check_calibration(model: Model, calib: Calib) -> None:
    """Raise UserError for a calibration that is made for another kind of model."""
    kind = kind_of(model)
    if (calib.mask is not None) != (kind == "text"):
        raise UserError(f"this calib is not made for {kind}; allowed for model={model.name}: {CALIBRATION[kind]}")


def samples_tokens(sampler: Sampler) -> bool:
    """Whether the sampler's scheduler fills in masked tokens."""
    from dqbench.schedulers import scheduler_class

    return "mask_token_id" in inspect.signature(scheduler_class(sampler).__init__).parameters
