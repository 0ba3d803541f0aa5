"""The handwritten digits that scikit-learn ships (1,797 real 8x8 scans with 17 gray levels), in the shapes we need."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

MAX_GRAY = 16  # scikit-learn stores gray levels 0..16


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None], torch.from_numpy(data.target).long()


def digits() -> tuple[Tensor, Tensor]:
    """All digits: images [1797, 1, 8, 8] float in [-1, 1], labels [1797] int64 in 0..9."""
    images, labels = _digits()
    return images * (2 / MAX_GRAY) - 1, labels.clone()


def digits_uint8() -> Tensor:
    """All digits as gray images: [1797, 1, 8, 8] uint8 in 0..255."""
    return (_digits()[0] * (255 / MAX_GRAY)).round().to(torch.uint8)


def split(fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint index sets that cover the digits; the second holds `fraction` of each class, drawn from `seed`."""
    labels = _digits()[1]
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in range(10):
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(len(members) * fraction)
        first.append(members[cut:])
        second.append(members[:cut])
    return torch.cat(first), torch.cat(second)


class DigitsRGB(Dataset):
    """Items [3, 8, 8] uint8, gray repeated: the form torch-fidelity expects of an image dataset."""

    def __init__(self, indices: Tensor | None = None):
        images = digits_uint8()
        self.images = images if indices is None else images[indices]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)
