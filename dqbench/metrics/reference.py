"""Reference data: opened by name or folder; its features are computed once and kept as an artifact."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.registry import DATASETS_REGISTRY
from torch_fidelity.utils import glob_samples_paths

from dqbench.errors import UserError
from dqbench.identity import digest
from dqbench.metrics.extractors import register
from dqbench.stages import Store

IMAGE_EXTENSIONS = "png,jpg,jpeg,webp,bmp"


def open_reference(name: str | None) -> Dataset:
    """The real images [3, H, W] uint8 that `name` (registered with torch-fidelity, or a folder) stands for."""
    register()
    if name in DATASETS_REGISTRY:
        return _open_registered(name)
    known = ", ".join(DATASETS_REGISTRY)
    if name is None or not os.path.isdir(name):
        raise UserError(f"no reference data {name!r}: model.data must be a folder of images or one of {known}")
    files = glob_samples_paths(name, samples_find_deep=True, samples_find_ext=IMAGE_EXTENSIONS, verbose=False)
    if not files:
        raise UserError(f"the reference folder {name} holds no images ({IMAGE_EXTENSIONS})")
    return ImagesPathDataset(files)


def _open_registered(name: str) -> Dataset:
    """Without downloading: torch-fidelity's own root, beside torch.hub's folder."""
    root = os.path.join(os.path.dirname(torch.hub.get_dir()), "fidelity_datasets")
    try:
        return DATASETS_REGISTRY[name](root, False)
    except RuntimeError as error:  # torchvision: not found or corrupted
        raise UserError(f"the data set {name} is not in {root}: put it there, or set model.data=FOLDER") from error


@dataclass(frozen=True)
class Extraction:
    """How features {layer: [N, D]} are made of images. `identity` (JSON-able) holds all that decides them."""

    identity: dict[str, Any]
    extract: Callable[[Dataset], dict[str, Tensor]]


@dataclass(frozen=True)
class Reference:
    """Features {layer: [N, D]} of real images; `hash` names images and extractor, the same on every machine."""

    features: dict[str, Tensor]
    hash: str


def load_reference(name: str, extraction: Extraction, cache_dir: Path) -> Reference:
    """The reference's features and hash, computed once and kept under `cache_dir`."""
    dataset = open_reference(name)

    def produce(folder: Path) -> None:
        save_file(extraction.extract(dataset), folder / "features.safetensors")
        (folder / "hash").write_text(digest(extraction.identity | {"images": _content(dataset)}))

    depends = extraction.identity | {"images": _fingerprint(dataset)}
    folder = Store(Path(cache_dir)).get("features", depends, produce).folder
    return Reference(load_file(folder / "features.safetensors"), (folder / "hash").read_text())


def _fingerprint(dataset: Dataset) -> str:
    """Cheap identity: files by path, size and time of change; other data sets by content."""
    if not isinstance(dataset, ImagesPathDataset):
        return _content(dataset)
    stats = [(path, os.stat(path)) for path in dataset.files]
    return digest([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _content(dataset: Dataset) -> str:
    """Hash of every decoded image, in order."""
    sha = hashlib.sha256()
    for index in range(len(dataset)):
        item = dataset[index]
        sha.update(str(tuple(item.shape)).encode() + item.contiguous().numpy().tobytes())
    return sha.hexdigest()
