"""Our feature extractor `digits-classifier` and data set `digits`, in torch-fidelity's registries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import (
    DATASETS_REGISTRY,
    FEATURE_EXTRACTORS_REGISTRY,
    register_dataset,
    register_feature_extractor,
)

from dqbench.errors import UserError
from dqbench.zoo.classifier import DigitsClassifier
from dqbench.zoo.data import DigitsRGB


class DigitsFeatureExtractor(FeatureExtractorBase):
    """The zoo's digits classifier on [N, 3, 8, 8] uint8: features `pooled`, `spatial` and `logits`."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
        super().__init__(name, features_list)
        self.classifier = DigitsClassifier.from_pretrained(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "spatial", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if input.shape[1:] != (3, 8, 8):
            raise UserError(f"digits metrics score 8x8 images, got {tuple(input.shape[2:])}: choose another metrics=")
        gray = input.float().mean(1, keepdim=True)
        features = self.classifier(gray / 127.5 - 1)
        return tuple(features[layer] for layer in self.features_list)


def register() -> None:
    """Make torch-fidelity know our names; safe to call again."""
    if "digits-classifier" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("digits-classifier", DigitsFeatureExtractor)
    if "digits" not in DATASETS_REGISTRY:
        register_dataset("digits", lambda root, download: DigitsRGB())
