"""Activation-aware scaling (AWQ, Lin et al. 2024, arXiv:2306.00978): columns that meet large inputs get finer steps.

y = (W diag(s)) (x / s): scaled up before rounding, with 1 / s folded into what makes x, a norm or another linear layer,
so that the full-precision network stays the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dqbench.errors import UserError
from dqbench.quant.hessian import InputStatistics

FLOOR = 1e-4  # of mean |x| to a power, as in the release


def foldable(source: nn.Module, targets: Sequence[nn.Module]) -> bool:
    """Whether 1 / s of the targets' inputs [M] can go into `source`: its output is their input, channel by channel.

    Not so where a linear source has fewer outputs, as values that several query heads share have.
    """
    outputs = source.out_features if isinstance(source, nn.Linear) else source.weight.numel()
    return all(isinstance(target, nn.Linear) and target.in_features == outputs for target in targets)


def fold(source: nn.Module, targets: Sequence[nn.Module], scale: Tensor) -> None:
    """Divide the outputs of `source`, a norm or a linear layer, by `scale` [M]; the targets' columns are multiplied."""
    scale = scale.to(source.weight.dtype)
    source.weight.data /= scale if source.weight.ndim == 1 else scale.unsqueeze(1)
    if getattr(source, "bias", None) is not None:
        source.bias.data /= scale
    for target in targets:
        target.weight.data *= scale


def search_scale(
    weights: Sequence[Tensor], statistics: InputStatistics, round_weight: Callable[[Tensor], Tensor], points: int
) -> Tensor:
    """s [M] = mean|x|^a / sqrt(max min), a = 0, 1/points, ...: that of the least tr(D H D^T), D [O, M] the change of W.

    That is the squared error of the layers' own outputs; the release takes that of the block they are in.
    """
    hessian, magnitude = statistics.hessian(), statistics.magnitude()
    tried = []
    for point in range(points):
        scale = magnitude.pow(point / points).clamp(min=FLOOR)
        scale = scale / (scale.max() * scale.min()).sqrt()
        changes = (round_weight(weight * scale) / scale - weight for weight in weights)
        tried.append((sum(((change @ hessian) * change).sum().item() for change in changes), point, scale))
    return min(tried, key=lambda one: one[:2])[2]


def check_points(points: int) -> None:
    """Raise UserError for a search that tries nothing."""
    if points < 1:
        raise UserError(f"method.points={points} is out of range; allowed: 1 or more, 1 for no scaling")


@torch.no_grad()
def scale_pairs(
    layer: nn.Module,
    pairs: dict[str, list[str]],
    statistics: dict[str, InputStatistics],
    round_weight: Callable[[str, Tensor], Tensor],
    points: int,
) -> dict[str, Tensor]:
    """Scale what follows each source of `pairs` (source -> targets, names in `layer`), in place; s by source.

    statistics: of the targets' inputs, by their names. A pair with a target that has none, as it is not quantized, is
    left alone, and so is one that does not fold.
    """
    found = {}
    for source, names in pairs.items():
        origin, targets = layer.get_submodule(source), [layer.get_submodule(name) for name in names]
        if not all(name in statistics for name in names) or not foldable(origin, targets):
            continue
        weights = [target.weight.float() for target in targets]
        found[source] = search_scale(
            weights, statistics[names[0]], lambda weight, name=names[0]: round_weight(name, weight), points
        )
        fold(origin, targets, found[source])
    return found
