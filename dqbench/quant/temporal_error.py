"""How far quantized temporal features are from exact ones, and the choice of what to cache that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from dqbench.arguments import Batch, flatten, nest
from dqbench.calibration import CalibrationSet
from dqbench.diagnostics import curves
from dqbench.errors import UserError
from dqbench.quant.temporal import Features, take

BATCH = 64


def summed_error(found: Features, exact: Features) -> float:
    """Sum over heads of mean over rows of sum over channels of squared error: what TIAR minimises, without penalty."""
    return float(sum(error_table(found, exact, "mse").mean(0)))


def error_table(found: Features, exact: Features, metric: str) -> Tensor:
    """[R, heads]: the squared distance (mse), or 1 - cosine (cosine), of each row's features."""
    pairs = zip(found, exact, strict=True)
    if metric == "mse":
        return torch.stack([(a - b).double().square().sum(dim=1) for a, b in pairs], dim=1)
    return torch.stack([1 - cosine_similarity(a.double(), b.double(), dim=1) for a, b in pairs], dim=1)


def choose_cached(maintained: Tensor, cached: Tensor, granularity: str) -> Tensor:
    """Where the cache errs less, [S, heads]; decided per timestep and head (ti), per head (i), or once (global)."""
    if granularity == "ti":
        return cached < maintained
    dims = 0 if granularity == "i" else (0, 1)
    return (cached.sum(dims) < maintained.sum(dims)).expand(cached.shape)


@torch.no_grad()
def network_features(model: nn.Module, heads: Sequence[str], calib: CalibrationSet, rows: Batch) -> Features:
    """The heads' outputs in forward passes of the whole network, its activations quantized; [R, C_i] each.

    rows replace arguments of the calibration set's first row, as temporal features depend on nothing else.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in heads}
    handles = [model.get_submodule(n).register_forward_hook(lambda *a, n=n: seen[n].append(a[2])) for n in heads]
    device, count = next(model.parameters()).device, len(rows["timestep"])
    try:
        for chosen in torch.arange(count).split(BATCH):
            others = flatten(calib.rows(np.zeros(len(chosen), dtype=np.int64), device))
            model(**nest(others | take(rows, chosen)))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(seen[name]) for name in heads]


def temporal_curves(timestep: Tensor, found: Features, exact: Features, heads: Sequence[str]) -> dict[str, Any]:
    """Groups of curves over the timesteps: cosine of found and exact features of each head, and their mismatch.

    mismatch: j - t, in steps of the sampler, for the exact features of step j that the found ones of step t are most
    like (cosine, mean over heads); left out where features depend on more than the timestep.
    """
    cosine = 1 - error_table(found, exact, "cosine")
    x, table = per_timestep(timestep, cosine)
    _, lowest = per_timestep(timestep, cosine.amin(1, keepdim=True))
    summary = {"mean over heads": table.mean(1).tolist(), "lowest of heads": lowest[:, 0].tolist()}
    groups = {
        "temporal features, cosine": curves(x, summary),
        "temporal features, cosine by head": curves(x, dict(zip(heads, table.T.tolist(), strict=True))),
    }
    if len(x) == len(timestep):
        groups["temporal features, mismatch in steps"] = curves(x, {"mismatch": mismatch(timestep, found, exact)})
    return groups


def error_curves(timestep: Tensor, exact: Features, found: dict[str, Features]) -> dict[str, Any]:
    """A group of curves: the squared error of the features, summed over heads, of each variant in `found`."""
    tables = {name: per_timestep(timestep, error_table(own, exact, "mse")) for name, own in found.items()}
    x = per_timestep(timestep, timestep.unsqueeze(1))[0]
    lines = {name: table.sum(1).tolist() for name, (_, table) in tables.items()}
    return {"temporal features, squared error": curves(x, lines, log=True)}


def per_timestep(timestep: Tensor, table: Tensor) -> tuple[list[float], Tensor]:
    """(distinct timesteps, noisiest first; the mean of table [R, n] over the rows of each, [S, n])."""
    distinct, group, count = timestep.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(distinct), table.shape[1], dtype=torch.float64, device=table.device)
    means = sums.index_add_(0, group, table.double()) / count.unsqueeze(1)
    return distinct.flip(0).tolist(), means.flip(0)


def mismatch(timestep: Tensor, found: Features, exact: Features) -> list[int]:
    """The shift delta_t of each timestep, noisiest first."""
    order = torch.argsort(timestep, descending=True)
    pairs = zip(found, exact, strict=True)
    likeness = sum(normalize(a[order].double(), dim=1) @ normalize(b[order].double(), dim=1).T for a, b in pairs)
    return (likeness.argmax(1) - torch.arange(len(order), device=likeness.device)).tolist()


def check_cacheable(inputs: Sequence[str]) -> None:
    """Raise UserError for temporal features that depend on more than the timestep."""
    if list(inputs) != ["timestep"]:
        others = ", ".join(name for name in inputs if name != "timestep")
        raise UserError(
            f"maintenance cm and ds cache features per timestep; this model's depend on {others} too: use tm"
        )
