"""The miniature diffusion model: a diffusers U-Net trained with DDPM on the digits (Ho et al. 2020, 2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Generator, Tensor, nn

from dqbench.zoo.data import digits


@dataclass
class DigitsDiffusion:
    unet: dict[str, Any]  # arguments of diffusers.UNet2DModel
    scheduler: dict[str, Any]  # arguments of diffusers.DDPMScheduler

    def __post_init__(self) -> None:
        self.noise = DDPMScheduler(**self.scheduler)
        self.images, _ = digits()

    def model(self) -> UNet2DModel:
        return UNet2DModel(**self.unet)

    def loss(self, model: nn.Module, batch_size: int, generator: Generator) -> Tensor:
        """L_simple on a random batch: E ||eps - eps_theta(x_t, t)||^2 (DDPM eq. 14)."""
        images = self.images[torch.randint(len(self.images), (batch_size,), generator=generator)]
        return self._loss_on(model, images, generator)

    def _loss_on(self, model: nn.Module, images: Tensor, generator: Generator) -> Tensor:
        device = next(model.parameters()).device
        timesteps = torch.randint(self.noise.config.num_train_timesteps, (len(images),), generator=generator)
        eps = torch.randn(images.shape, generator=generator)
        noisy = self.noise.add_noise(images, eps, timesteps)
        predicted = model(noisy.to(device), timesteps.to(device)).sample
        return nn.functional.mse_loss(predicted, eps.to(device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """L_simple over every digit, averaged over two seeded draws of timestep and noise."""
        generator = torch.Generator().manual_seed(0)
        losses = [self._loss_on(model, self.images, generator).item() for _ in range(2)]
        return {"loss": sum(losses) / 2}

    def save(self, model: UNet2DModel, folder: Path) -> None:
        DDPMPipeline(unet=model, scheduler=self.noise).save_pretrained(folder, safe_serialization=True)
