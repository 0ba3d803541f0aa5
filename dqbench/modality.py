"""What differs between image and language models: how samples are made, compared with full precision's, and shown."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dqbench.config import Calib, Model
from dqbench.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dqbench.metrics.base import Metric
    from dqbench.record import Stages
    from dqbench.run import Cell, Quantized
    from dqbench.stages import Artifact

KINDS = {"image": "dqbench.images", "text": "dqbench.text.modality"}  # modules with the functions of Modality
SCORERS = {"image": "metrics=digits, inception, clean_fid or none", "text": "metrics=text or none"}
CALIBRATION = {"image": "calib=uniform, every_step or paper", "text": "calib=mcs"}


class Modality(Protocol):
    """A module of KINDS."""

    def check_model(self, model: Model) -> None:
        """Raise UserError where the model lacks what its samples are made from."""

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


def check_modality(model: Model, calib: Calib, method: Any, scorer: Any) -> None:
    """Raise UserError for a method, metrics or calibration that are made for another kind of model."""
    kind = kind_of(model)
    modality_of(model).check_model(model)
    made_for: Sequence[str] = getattr(method, "modalities", tuple(KINDS))
    if kind not in made_for:
        raise UserError(f"method={method.name} works on {made_for[0]} models; model={model.name} makes {kind}")
    if kind not in getattr(scorer, "modalities", ("image",)):
        raise UserError(f"these metrics cannot score {kind}; allowed for model={model.name}: {SCORERS[kind]}")
    if (calib.mask is not None) != (kind == "text") and not unquantized(method):
        raise UserError(f"this calib is not made for {kind}; allowed for model={model.name}: {CALIBRATION[kind]}")


def unquantized(method: Any) -> bool:
    """Whether the method is full precision, which needs no calibration."""
    return method.name == "fp32"
