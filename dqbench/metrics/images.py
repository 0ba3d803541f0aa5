"""Images on their way through a feature extractor, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dqbench.errors import UserError
from dqbench.progress import track


class ArrayImages(Dataset):
    """Items [3, H, W] uint8 of an array [N, H, W, C], read one by one; one channel is repeated."""

    def __init__(self, images: np.ndarray):
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[-1] not in (1, 3):
            raise UserError(f"images to score are uint8 [N, H, W, 1 or 3], got {images.dtype} {tuple(images.shape)}")
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1).expand(3, -1, -1)


@torch.no_grad()
def extract(
    images: Dataset, network: Callable[[Tensor], tuple[Tensor, ...]], batch_size: int, device: str
) -> list[Tensor]:
    """The outputs of `network`, which lies on `device`, for all images: one tensor [N, D] on the CPU per output."""
    batches = DataLoader(images, batch_size)
    shown = track(batches, "features of images", len(batches)) if len(batches) > 1 else batches
    outputs = [network(batch.to(device)) for batch in shown]
    return [torch.cat([part.cpu() for part in parts]) for parts in zip(*outputs, strict=True)]
