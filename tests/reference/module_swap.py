"""Reconstruction of one unit the plain way: modules swapped for ones that re-quantize their weight at each forward.

Written from Q-Diffusion (Li et al. 2023, arXiv:2302.04304), BRECQ (arXiv:2102.05426) and AdaRound (arXiv:2004.10568),
not from dqbench.quant: quantizers are composites that autograd differentiates by itself, every parameter requires a
gradient, nothing is precomputed, the calibration data lies in RAM. Tests and the benchmark compare with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference.quantizers import GAMMA, ZETA, adaround_soft, rounding_penalty, ste_fake_quantize


@dataclass
class LayerSpec:
    """What one layer is quantized with: scale and zero_point broadcast to its full-precision weight."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    n_bits: int


class SwappedLayer(nn.Module):
    """A conv or linear that quantizes its weight at each forward, and its input where it has steps for that."""

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        self.layer, self.n_bits = layer, spec.n_bits
        self.weight, self.bias = nn.Parameter(spec.weight.clone()), layer.bias
        self.scale, self.zero_point = spec.scale, spec.zero_point
        rest = spec.weight / spec.scale - torch.floor(spec.weight / spec.scale)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))
        self.hard = False
        self.act: nn.Module | None = None

    def quantized_weight(self) -> Tensor:
        """Soft AdaRound weights, or rounded ones."""
        if not self.hard:
            return adaround_soft(self.weight, self.alpha, self.scale, self.zero_point, self.n_bits)
        codes = torch.floor(self.weight / self.scale) + (self.alpha >= 0).float() + self.zero_point
        return (torch.clamp(codes, 0, 2**self.n_bits - 1) - self.zero_point) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.act is None else self.act(x)
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, self.quantized_weight(), self.bias)
        layer = self.layer
        return functional.conv2d(x, self.quantized_weight(), self.bias, layer.stride, layer.padding, layer.dilation)


class Step(nn.Module):
    """Fake quantization of an activation with a learnable scale, fixed zero point."""

    def __init__(self, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.scale, self.zero_point, self.bounds = nn.Parameter(scale.clone()), zero_point.clone(), bounds

    def forward(self, x: Tensor) -> Tensor:
        return ste_fake_quantize(x, self.scale, self.zero_point, *self.bounds)


class SplitStep(nn.Module):
    """Two steps, for channels [:split] and [split:]."""

    def __init__(self, split: int, first: Step, second: Step) -> None:
        super().__init__()
        self.split, self.first, self.second = split, first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x[:, : self.split]), self.second(x[:, self.split :])], dim=1)


class AttentionSteps(nn.Module):
    """Self-attention over the pixels of [B, C, H, W], as diffusers' Attention computes it, its operands quantized."""

    def __init__(self, steps: dict[str, Step]) -> None:
        super().__init__()
        self.steps = nn.ModuleDict(steps)

    def __call__(self, attn: nn.Module, x: Tensor, *_: None, **__: None) -> Tensor:
        B, C, H, W = x.shape
        tokens = attn.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (self.steps[part](getattr(attn, f"to_{part}")(tokens)) for part in ("q", "k", "v"))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = self.steps["softmax"](torch.softmax(q @ k.transpose(-1, -2) * attn.scale, dim=-1))
        out = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(B, C, H, W)
        return (out + x) / attn.rescale_output_factor


def swap(unit: nn.Module, specs: dict[str, LayerSpec]) -> tuple[nn.Module, dict[str, SwappedLayer]]:
    """A copy of `unit` with the layers of `specs` swapped ("" is the unit); all its parameters require gradients."""
    unit = copy.deepcopy(unit).requires_grad_(True)
    swapped = {name: SwappedLayer(unit.get_submodule(name), spec) for name, spec in specs.items()}
    for name, layer in swapped.items():
        if name:
            unit.set_submodule(name, layer)
    return swapped.get("", unit), swapped


def reconstruction_loss(output: Tensor, target: Tensor, p: float) -> Tensor:
    """mean over all dims but dim 1 of sum over dim 1 of |output - target|^p."""
    return (output - target).abs().pow(p).sum(1).mean()


@dataclass
class Rounding:
    """Settings of the weight phase: penalty x sum of 1 - |2h - 1|^beta from iteration `start` (from 1) on."""

    iters: int
    lr: float
    p: float
    penalty: float
    start: float
    beta: tuple[float, float]


def learn_rounding(
    unit: nn.Module, layers: Iterable[SwappedLayer], batches: Iterable, settings: Rounding
) -> Iterator[float]:
    """The weight phase; yields the mini-batch's loss of each iteration. batches: (args, kwargs, target)."""
    layers = list(layers)
    optimizer = torch.optim.Adam([layer.alpha for layer in layers], lr=settings.lr)
    for count, (args, kwargs, target) in enumerate(batches, start=1):
        loss = total = reconstruction_loss(unit(*args, **kwargs), target, settings.p)
        if count >= settings.start:
            progress = (count - settings.start) / max(settings.iters - settings.start, 1)
            beta = settings.beta[1] + (settings.beta[0] - settings.beta[1]) * max(0.0, 1 - progress)
            for layer in layers:
                total = total + settings.penalty * rounding_penalty(layer.alpha, beta)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield float(loss.detach())


def learn_steps(unit: nn.Module, batches: Iterable, iters: int, lr: float, p: float) -> Iterator[float]:
    """The activation phase: Adam with cosine annealing on the scales; yields the loss of each iteration."""
    optimizer = torch.optim.Adam([module.scale for module in unit.modules() if isinstance(module, Step)], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iters)
    for args, kwargs, target in batches:
        loss = reconstruction_loss(unit(*args, **kwargs), target, p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
