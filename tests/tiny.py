"""A tiny diffusers pipeline with every kind of unit: a level with attention, skip concatenations, shortcut convs."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel

from dqbench.calibration import CalibrationSet
from dqbench.config import Recon, Sampler, build, compose, data_root
from dqbench.models import UnconditionalPipeline
from dqbench.sampling import set_sampler


def methods_for(modality: str) -> list[str]:
    """The method presets that quantize models of a kind, image or text."""
    names = sorted(path.stem for path in (data_root() / "conf" / "method").glob("*.yaml"))
    built = {name: build(compose([f"method={name}"]).method) for name in names if name != "fp32"}
    return [name for name, method in built.items() if modality in getattr(method, "modalities", ("image", "text"))]


def pipeline(seed: int = 0, sampler: Sampler | None = None, dropout: float = 0.0) -> UnconditionalPipeline:
    """Random weights, 8x8 one-channel samples, 100 training steps."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D",
        "UpBlock2D"), attention_head_dim=8, dropout=dropout,
    )  # fmt: skip
    pipe = UnconditionalPipeline(unet.eval().requires_grad_(False), DDPMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return set_sampler(pipe, sampler or ddim())


def ddim(steps: int = 5, **changes: object) -> Sampler:
    """DDIM, eta 0."""
    values = {
        "scheduler": "DDIMScheduler", "steps": steps, "eta": 0.0, "spacing": "leading", "guidance": 1.0, "num_samples":
        8, "batch_size": 4, "kwargs": {},
    }  # fmt: skip
    return Sampler(**values | changes)


def calibration(rows: int = 24, seed: int = 0) -> CalibrationSet:
    """Random inputs, the steps of ddim() in turn."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 1, 8, 8, generator=generator)
    return CalibrationSet.from_tensors(sample, torch.tensor([80, 60, 40, 20, 0]).repeat(rows)[:rows])


def recon(**changes: object) -> Recon:
    """Few iterations with a rate that shows."""
    values = {
        "iters": 20, "iters_act": 10, "batch_size": 8, "lr": 0.03, "lr_act": 1e-3, "p": 2.0, "p_act": 2.4, "penalty":
        0.01, "warmup": 0.2, "beta": [20.0, 2.0], "asymmetric": True, "order": "execution", "dropout": False,
        "split_penalty": "both", "bound_steps": True, "act_init": "random", "act_init_samples": 16,
    }  # fmt: skip
    return Recon(**values | changes)
