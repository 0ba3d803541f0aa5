"""How much a network loses when one layer's weight has few bits: the losses that bit-widths are allocated by.

fisher: sum g^2 dW^2, g^2 the diagonal Fisher information of the output (a Gaussian of unit variance around the
predicted noise; for a language model the categorical at masked positions), from one random target per row. hessian:
||dW x||^2 / ||W x||^2 = tr(dW H dW^T) / tr(W H W^T), H = sum x x^T, relative so that layers compare. loo: the mean
squared error of the output with this layer alone quantized; for a language model the rise of the NLL of the tokens that
full precision finds most likely. kl: KL(full precision || quantized) at masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbench.calibration import Batch, CalibrationSet, named_generator
from dqbench.errors import UserError, check_choice
from dqbench.quant.capture import first_tensor
from dqbench.quant.centroid_recon import WeightCentroids
from dqbench.quant.knapsack import allocate
from dqbench.quant.sparse_compute import apply

SCORES = ("fisher", "hessian", "loo", "kl")
Deltas = Mapping[str, Mapping[int, Tensor]]  # layer -> width -> change of its weight
Losses = dict[str, dict[int, float]]
METHODS = ("none", "greedy", "exact")


@dataclass
class MixedBits:
    """Widths from bits.weight - spread to bits.weight + spread whose mean over the weights is bits.weight exactly."""

    method: str  # none | greedy | exact
    score: str
    spread: int
    rows: int  # calibration rows that losses are measured on

    def __post_init__(self) -> None:
        check_choice("method.mixed.method", self.method, METHODS)
        check_choice("method.mixed.score", self.score, SCORES)
        for key in ("spread", "rows"):
            if getattr(self, key) < 1:
                raise UserError(f"method.mixed.{key}={getattr(self, key)} is out of range; allowed: 1 or more")

    def choose(
        self, network: nn.Module, names: Sequence[str], n_bits: int, weight: WeightCentroids, calib: CalibrationSet
    ) -> dict[str, int]:
        """The width of each of the layers `names`, at most 8 and below what is uniform."""
        widths = [b for b in range(n_bits - self.spread, n_bits + self.spread + 1) if 2 <= b < weight.uniform_from]
        if n_bits not in widths:
            return dict.fromkeys(names, n_bits)
        layers = {name: network.get_submodule(name) for name in names}
        deltas = {name: {b: change(layer, b, weight) for b in widths} for name, layer in layers.items()}
        batches = list(calib.batches(next(network.parameters()).device))
        losses = score(self.score, network, deltas, batches, calib.seed)
        sizes = [layer.weight.numel() for layer in layers.values()]
        return dict(zip(names, allocate([losses[name] for name in names], sizes, n_bits, self.method), strict=True))


def change(layer: nn.Module, n_bits: int, weight: WeightCentroids) -> Tensor:
    """What k-means at this width does to a layer's weight."""
    return weight.code(layer.weight, n_bits, 0, None).dequantize().reshape(layer.weight.shape) - layer.weight.detach()


def score(kind: str, network: nn.Module, deltas: Deltas, batches: Sequence[Batch], seed: int) -> Losses:
    """Layer -> width -> loss, in full precision but for that one layer."""
    if kind == "fisher":
        return fisher(network, deltas, batches, seed)
    if kind == "hessian":
        return hessian(network, deltas, batches)
    return leave_one_out(network, deltas, batches, kind)


@torch.enable_grad()
def fisher(network: nn.Module, deltas: Deltas, batches: Sequence[Batch], seed: int) -> Losses:
    """sum g^2 dW^2; random targets have zero mean, so that a batch's squared gradient is the sum over its rows' own."""
    losses: Losses = {name: dict.fromkeys(own, 0.0) for name, own in deltas.items()}
    generator = named_generator("fisher", seed)
    weights = {name: network.get_submodule(name).weight for name in deltas}
    with learning(weights.values()):
        for batch in batches:
            loss = random_target_loss(predict(network, batch), network, batch, generator)
            slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, own), slope in zip(deltas.items(), slopes, strict=True):
                for width, delta in own.items():
                    losses[name][width] += 0.0 if slope is None else float((slope * delta).square().sum())
    return losses


def random_target_loss(output: Tensor, network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """A negative log-likelihood whose gradient has the Fisher information as its covariance."""
    masked = masked_positions(network, batch)
    if masked is None:
        return (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    logits = output[masked].float()
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


@contextmanager
def learning(weights: Any) -> Iterator[None]:
    """Inside: gradients reach the weights."""
    weights = list(weights)
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@torch.no_grad()
def hessian(network: nn.Module, deltas: Deltas, batches: Sequence[Batch]) -> Losses:
    """||dW x||^2 / ||W x||^2 over full-precision inputs."""
    sums = {name: {width: 0.0 for width in (0, *own)} for name, own in deltas.items()}

    def measure(name: str) -> Callable:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for width, delta in {0: layer.weight, **deltas[name]}.items():
                sums[name][width] += float(apply(layer, delta, None, args[0]).square().sum())

        return add

    handles = [network.get_submodule(name).register_forward_pre_hook(measure(name)) for name in deltas]
    try:
        for batch in batches:
            network(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: {k: own[k] / max(own[0], 1e-30) for k in deltas[name]} for name, own in sums.items()}


@torch.no_grad()
def leave_one_out(network: nn.Module, deltas: Deltas, batches: Sequence[Batch], kind: str) -> Losses:
    """The mean loss over the batches with one layer's weight changed, against the untouched network."""
    exact = [predict(network, batch) for batch in batches]
    if kind == "kl" and masked_positions(network, batches[0]) is None:
        raise UserError("mixed.score=kl needs a language model; allowed for others: fisher, hessian, loo")
    losses: Losses = {name: {} for name in deltas}
    for name, own in deltas.items():
        for width, delta in own.items():
            with changed(network.get_submodule(name), delta):
                found = [
                    output_loss(predict(network, batch), wanted, masked_positions(network, batch), kind)
                    for batch, wanted in zip(batches, exact, strict=True)
                ]
            losses[name][width] = sum(found) / len(found)
    return losses


def output_loss(output: Tensor, wanted: Tensor, masked: Tensor | None, kind: str) -> float:
    """Of one batch: mean squared error, or of a language model's masked positions the rise of the NLL, or the KL."""
    if masked is None:
        return float((output - wanted).square().mean())
    found, exact = (logits[masked].float().log_softmax(1) for logits in (output, wanted))
    if kind == "kl":
        return float(F.kl_div(found, exact, log_target=True, reduction="sum") / max(len(exact), 1))
    likely = exact.argmax(1, keepdim=True)
    return float((exact - found).gather(1, likely).sum() / max(len(likely), 1))


@contextmanager
def changed(layer: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside: the layer's weight is changed by delta."""
    kept = layer.weight.data
    layer.weight.data = kept + delta.to(kept.dtype)
    try:
        yield
    finally:
        layer.weight.data = kept


def predict(network: nn.Module, batch: Batch) -> Tensor:
    """The predicted noise, or logits [B, L, V]."""
    return first_tensor(network(**batch))


def masked_positions(network: nn.Module, batch: Batch) -> Tensor | None:
    """Where a language model's tokens are masked, bool [B, L]; None for other networks."""
    mask_id = getattr(network.config, "mask_token_id", None)
    return batch["input_ids"] == mask_id if mask_id is not None and "input_ids" in batch else None
