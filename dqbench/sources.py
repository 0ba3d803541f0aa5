"""Calibration inputs that do not come from the trajectory: noise, real images, noised images (PTQ4DM, Table 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dqbench.arguments import SAMPLES
from dqbench.calibration import named_generator
from dqbench.config import Calib
from dqbench.errors import UserError
from dqbench.models import anatomy


def replace_source(pipe: DiffusionPipeline, calib: Calib, seed: int, target: Path) -> None:
    """Replace the samples in `target` by what PTQ4DM's Table 2 compares: noise, clean images, or noised images.

    noise: x ~ N(0, I). image: x_0. train_mimic: q(x_t | x_0) at the row's own time step.
    """
    file = next(target / f"{name}.npy" for name in SAMPLES if (target / f"{name}.npy").exists())
    rows, timestep = np.load(file, mmap_mode="r+"), np.load(target / "timestep.npy")
    generator = named_generator(calib.source, seed)
    for first in range(0, len(rows), 256):
        part = slice(first, min(first + 256, len(rows)))
        noise = torch.randn(rows[part].shape, generator=generator)
        rows[part] = (
            noise if calib.source == "noise" else clean(pipe, calib, noise, timestep[part], generator)
        ).numpy()
    rows.flush()


def clean(
    pipe: DiffusionPipeline, calib: Calib, noise: Tensor, timestep: np.ndarray, generator: torch.Generator
) -> Tensor:
    """Real images in the denoiser's space, noised to `timestep` for train_mimic; same shape as `noise`."""
    images = encode(pipe, real_images(anatomy(pipe).data, len(noise), generator))
    if images.shape != noise.shape:
        raise UserError(
            f"model.data gives samples of shape {list(images.shape[1:])}; the denoiser takes {list(noise.shape[1:])}"
        )
    if calib.source == "image":
        return images
    return pipe.scheduler.add_noise(images, noise, torch.from_numpy(timestep).long())


def real_images(data: str | None, count: int, generator: torch.Generator) -> Tensor:
    """`count` images [N, C, H, W] in [-1, 1], drawn with replacement from a registered data set or a folder."""
    if data is None:
        raise UserError(
            "calib.source=image and train_mimic need real images; set model.data=digits or model.data=FOLDER"
        )
    if data == "digits":
        from dqbench.zoo.data import digits

        images, _ = digits()
        return images[torch.randint(len(images), (count,), generator=generator)]
    files = sorted(
        path for path in Path(data).expanduser().glob("**/*") if path.suffix.lower() in {".png", ".jpg", ".jpeg"}
    )
    if not files:
        raise UserError(f"model.data={data}: no .png or .jpg files there")
    chosen = [files[int(i)] for i in torch.randint(len(files), (count,), generator=generator)]
    from torchvision.io import ImageReadMode, read_image

    return torch.stack([read_image(str(file), ImageReadMode.RGB).float() / 127.5 - 1 for file in chosen])


def encode(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images in the space the denoiser works in: the VAE's latents where the pipeline has one, else as they are."""
    vae = getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None)
    if vae is None:
        return images
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (latents * getattr(vae.config, "scaling_factor", 1.0)).float().cpu()
