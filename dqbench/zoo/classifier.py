"""The digits classifier that scores the miniature: predictions, pooled features and a spatial feature map."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dqbench.zoo.data import digits, split

SPATIAL_CHANNELS = 8


class DigitsClassifier(nn.Module):
    """[N, 1, 8, 8] in [-1, 1] -> {logits [N, 10], pooled [N, width], spatial [N, 8 * 4 * 4]}.

    `spatial` is the first channels of the last feature map, flattened: what sFID takes from Inception's 17x17 map
    (Nash et al. 2021, 2103.03841), at the size of this classifier. Features are normalized over channels, so that a
    few far-off samples do not rule the distances between feature sets.
    """

    def __init__(self, width: int):
        super().__init__()
        self.config = {"width": width}
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()
        )
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        feature_map = normalize(self.body(F.avg_pool2d(self.stem(images), 2)))
        pooled = normalize(feature_map.mean((2, 3)))
        spatial = feature_map[:, :SPATIAL_CHANNELS].flatten(1)
        return {"logits": self.head(pooled), "pooled": pooled, "spatial": spatial}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> DigitsClassifier:
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.requires_grad_(False).eval()


def normalize(features: Tensor) -> Tensor:
    """[N, C, ...] with mean 0 and variance 1 over C."""
    return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


def shift(images: Tensor, generator: Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions, empty pixels black: [N, 1, H, W] in [-1, 1]."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(3, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@dataclass
class DigitsClassification:
    model_args: dict[str, Any]  # arguments of DigitsClassifier
    held_out: float  # share of each class that training never sees
    split_seed: int
    label_smoothing: float

    def __post_init__(self) -> None:
        self.images, self.labels = digits()
        self.train_indices, self.test_indices = split(self.held_out, self.split_seed)

    def model(self) -> DigitsClassifier:
        return DigitsClassifier(**self.model_args)

    def loss(self, model: nn.Module, batch_size: int, generator: Generator) -> Tensor:
        """Cross entropy on a random batch of shifted training digits."""
        device = next(model.parameters()).device
        batch = self.train_indices[torch.randint(len(self.train_indices), (batch_size,), generator=generator)]
        logits = model(shift(self.images[batch], generator).to(device))["logits"]
        return F.cross_entropy(logits, self.labels[batch].to(device), label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss, accuracy and share of confident (>= 0.9) predictions on the held-out digits."""
        device = next(model.parameters()).device
        logits = model(self.images[self.test_indices].to(device))["logits"].cpu()
        labels = self.labels[self.test_indices]
        return {
            "held_out": len(labels),
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "confident": (logits.softmax(1).amax(1) >= 0.9).float().mean().item(),
        }

    def save(self, model: DigitsClassifier, folder: Path) -> None:
        model.save_pretrained(folder)
