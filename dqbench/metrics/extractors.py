"""Our feature extractors and data set `digits`, in torch-fidelity's registries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
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


class SpatialInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with a layer `spatial` [N, 2023] for sFID (Nash et al. 2021, arXiv:2103.03841).

    As in guided-diffusion's evaluator: the first 7 channels of what TensorFlow calls mixed_6/conv, 17 x 17 positions.
    """

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        wanted, seen = self.features_list, []
        self.features_list = list(dict.fromkeys("768" if layer == "spatial" else layer for layer in wanted))
        handle = self.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            features = dict(zip(self.features_list, super().forward(input), strict=True))  # 768 comes after mixed_6
        finally:
            self.features_list = wanted
            handle.remove()
        features["spatial"] = seen[0][:, :7].flatten(1).float()
        return tuple(features[layer] for layer in wanted)


def register() -> None:
    """Make torch-fidelity know our names; safe to call again."""
    if "inception-v3-spatial" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("inception-v3-spatial", SpatialInception)
    if "digits-classifier" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("digits-classifier", DigitsFeatureExtractor)
    if "digits" not in DATASETS_REGISTRY:
        register_dataset("digits", lambda root, download: DigitsRGB())
