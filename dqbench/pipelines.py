"""Pipelines of released networks that need more than UnconditionalPipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDPMScheduler, ImagePipelineOutput, ModelMixin, UNet2DModel, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dqbench.models import UnconditionalPipeline


def set_heads(network: nn.Module, heads: int) -> None:
    """Give every attention `heads` heads, whatever its width: UNet2DModel knows one width for all heads instead."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.heads, module.scale = heads, (module.to_q.out_features // heads) ** -0.5


class EightHeadsPipeline(UnconditionalPipeline):
    """LDM-8 on LSUN churches: 8 attention heads at every width."""

    def __init__(self, unet: UNet2DModel, scheduler: Any, vqvae: VQModel | AutoencoderKL | None = None) -> None:
        super().__init__(unet, scheduler, vqvae)
        set_heads(unet, 8)


class ImprovedPipeline(UnconditionalPipeline):
    """IDDPM (Nichol and Dhariwal 2021, arXiv:2102.09672): 4 heads at every width, time steps embedded as 1,000 of them.

    The network predicts noise and variance; a scheduler that takes no variance gets the noise alone.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any, vqvae: VQModel | AutoencoderKL | None = None) -> None:
        super().__init__(unet, scheduler, vqvae)
        set_heads(unet, 4)
        unet.time_proj.scale = 1000 / scheduler.config.num_train_timesteps

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        predicted = super()._predict(x_t, t)
        return predicted if isinstance(self.scheduler, DDPMScheduler) else predicted[:, : x_t.shape[1]]


class ClassEmbedding(ModelMixin, ConfigMixin):
    """Classes as tokens, the last one meaning none: [B] -> [B, 1, width]."""

    @register_to_config
    def __init__(self, num_classes: int = 1000, width: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]


class ClassConditionalPipeline(UnconditionalPipeline):
    """LDM-4 on ImageNet (Rombach et al. 2022, arXiv:2112.10752): the class is a token of the cross-attention.

    Classifier-free guidance e = e_none + w (e_class - e_none), w = guidance_scale; without it (w = 1) one half is run.
    """

    def __init__(
        self, unet: Any, scheduler: Any, classes: ClassEmbedding, vqvae: VQModel | AutoencoderKL | None = None
    ) -> None:
        super().__init__(unet, scheduler, vqvae)
        self.register_modules(classes=classes)

    @torch.no_grad()
    def __call__(
        self,
        generator: Sequence[torch.Generator],
        class_labels: Sequence[int],
        num_inference_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        output_type: str = "np",
    ) -> ImagePipelineOutput:
        """Sample len(generator) images in [0, 1] of `class_labels`: "np" [B, H, W, C] or "pt" [B, C, H, W]."""
        labels = torch.tensor(list(class_labels), device=self._execution_device)
        halves = [labels] if guidance_scale == 1 else [torch.full_like(labels, self.classes.config.num_classes), labels]
        tokens = self.classes(torch.cat(halves)).to(self.unet.dtype)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            predicted = self.unet(torch.cat([x_t] * len(halves)), t, encoder_hidden_states=tokens).sample
            none, *rest = predicted.chunk(len(halves))
            return none + guidance_scale * (rest[0] - none) if rest else none

        return self._sample(generator, num_inference_steps, eta, output_type, predict)
