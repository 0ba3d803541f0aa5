"""Clean-FID: the Inception distances of clean-fid, with its anti-aliased resize (Parmar et al. 2022, 2104.11222)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as library_version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from cleanfid.fid import fid_from_feats, kernel_distance
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dqbench.errors import UserError
from dqbench.metrics.base import Metric
from dqbench.metrics.images import ArrayImages, extract
from dqbench.metrics.measure import Kind, Panel, Statistic, Values
from dqbench.metrics.reference import Extraction, Reference, load_reference, open_reference
from dqbench.metrics.weights import find_weights, hash_weights

WEIGHTS_FILE = "inception-2015-12-05.pt"  # the one name that clean-fid loads
HOME = Path("/tmp")  # where clean-fid keeps it
LAYER = "2048"


def frechet(features: Tensor, reference: np.ndarray) -> Values:
    """Fréchet distance of Gaussians fitted to both feature sets."""
    return (float(fid_from_feats(features.numpy(), reference)),)


def kernel(features: Tensor, reference: np.ndarray, subsets: int, subset_size: int) -> Values:
    """Unbiased squared MMD with the cubic kernel; clean-fid draws subsets from numpy's global state, seeded here."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        return (kernel_distance(reference, features.numpy(), num_subsets=subsets, max_subset_size=subset_size),)
    finally:
        np.random.set_state(state)


KINDS = {
    "frechet": Kind(frechet, higher_is_better=False, prepare=Tensor.numpy),
    "kernel": Kind(kernel, higher_is_better=False, prepare=Tensor.numpy),
}


class CleanResized(Dataset):
    """Images [3, H, W] uint8 as [3, 299, 299] float in 0..255, resized the clean way."""

    def __init__(self, images: Dataset):
        self.images, self.resize = images, build_resizer("clean")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index].permute(1, 2, 0).numpy()
        return torch.from_numpy(self.resize(image)).permute(2, 0, 1)


@dataclass
class CleanFID:
    version: int
    weights: str | None  # path of the TorchScript file; null: where clean-fid looks for it
    batch_size: int
    seed: int  # of the bootstrap
    statistics: dict[str, Statistic]

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError if anything is missing; ends with a trial on one real image."""
        self._panel(reference).check([LAYER], num_samples)
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
        protocol = f"clean-fid {library_version('clean-fid')}, reference {reference}"
        return Panel(self.statistics, KINDS, WEIGHTS_FILE, protocol, self.seed)

    def _reference(self, reference: str, cache_dir: Path, device: str) -> Reference:
        identity = {"extractor": "clean-fid", "version": self.version, "weights": self.weights_hash()}
        return load_reference(reference, Extraction(identity, partial(self._extract, device=device)), cache_dir)

    def _weights(self) -> Path:
        return find_weights(self.weights, HOME / WEIGHTS_FILE)

    def _extract(self, images: Dataset, device: str) -> dict[str, Tensor]:
        """Features {layer: [N, 2048]} on the CPU."""
        model = load_inception(self._weights()).to(device).eval()
        (features,) = extract(CleanResized(images), lambda batch: (model(batch),), self.batch_size, device)
        return {LAYER: features}


def load_inception(weights: Path) -> InceptionV3W:
    """clean-fid's network from a TorchScript file of any name."""
    with TemporaryDirectory() as folder:
        (Path(folder) / WEIGHTS_FILE).symlink_to(weights.resolve())
        try:
            return InceptionV3W(folder, download=False, resize_inside=False)
        except (RuntimeError, AttributeError) as error:  # not TorchScript, or not this network
            raise UserError(f"{weights} does not hold clean-fid's TorchScript Inception") from error
