"""Metrics on features of any extractor that torch-fidelity knows: the zoo's digits classifier, Inception, yours."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from dqbench.errors import UserError
from dqbench.metrics.base import Metric
from dqbench.metrics.extractors import register
from dqbench.metrics.images import ArrayImages, extract
from dqbench.metrics.measure import Panel, Statistic
from dqbench.metrics.reference import Extraction, Reference, load_reference, open_reference
from dqbench.metrics.statistics import KINDS
from dqbench.metrics.weights import find_weights, hash_weights

UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


@dataclass
class FeatureMetrics:
    version: int
    extractor: str  # a name in torch-fidelity's registry
    weights: str | None  # its weights: a path or zoo:NAME; null: `weights_file` where torch-fidelity looks for it
    weights_file: str
    batch_size: int
    seed: int  # of the bootstrap
    statistics: dict[str, Statistic]

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError if anything is missing; ends with a trial on one real image."""
        register()
        if self.extractor not in FEATURE_EXTRACTORS_REGISTRY:
            raise UserError(f"no feature extractor {self.extractor!r}; known: {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
        layers = FEATURE_EXTRACTORS_REGISTRY[self.extractor].get_provided_features_list()
        self._panel(reference).check(layers, num_samples)
        self._extract(Subset(open_reference(reference), [0]), "cpu")

    def score(self, samples: np.ndarray, reference: str, cache_dir: Path, *, device: str = "cpu") -> dict[str, Metric]:
        """Every metric of uint8 images [N, H, W, C] (C: 1 or 3), read from `samples` one by one."""
        features = self._extract(ArrayImages(samples), device)
        return self._panel(reference).measure(features, self._reference(reference, cache_dir, device).features)

    def reference_hash(self, reference: str, cache_dir: Path, *, device: str = "cpu") -> str:
        return self._reference(reference, cache_dir, device).hash

    def weights_hash(self) -> str:
        return hash_weights(self._weights())

    def _panel(self, reference: str | None) -> Panel:
        protocol = f"torch-fidelity {torch_fidelity.__version__}, reference {reference}"
        return Panel(self.statistics, KINDS, self.extractor, protocol, self.seed)

    def _reference(self, reference: str, cache_dir: Path, device: str) -> Reference:
        extraction = Extraction(self._identity(), partial(self._extract, device=device))
        return load_reference(reference, extraction, cache_dir)

    def _identity(self) -> dict[str, Any]:
        identity = {"extractor": self.extractor, "version": self.version, "layers": self._panel(None).layers}
        return identity | {"weights": self.weights_hash()}

    def _weights(self) -> Path:
        return find_weights(self.weights, Path(torch.hub.get_dir()) / "checkpoints" / self.weights_file)

    def _extract(self, images: Dataset, device: str) -> dict[str, Tensor]:
        """Features {layer: [N, D]} on the CPU."""
        register()
        layers, weights = self._panel(None).layers, str(self._weights())
        arguments = {"cuda": False, "verbose": False, "feature_extractor_weights_path": weights}
        try:
            extractor = create_feature_extractor(self.extractor, layers, **arguments)
        except UNREADABLE as error:
            raise UserError(f"{weights} does not hold weights of {self.extractor}: {type(error).__name__}") from error
        return dict(zip(layers, extract(images, extractor.to(device), self.batch_size, device), strict=True))
