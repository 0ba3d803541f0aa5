"""How a quantized denoiser errs along the full-precision trajectory: collect() -> sums per chain -> estimate().

PTQD (He et al. 2023, arXiv:2305.10657): with e the noise that full precision predicts and e + D what the quantized
network predicts at the same x_t, both after guidance, D = k e + D' at each step; D' has a mean for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.stats import normaltest
from torch import Tensor, nn

from dqbench.arguments import SAMPLES
from dqbench.calibration import named_generator, named_seed
from dqbench.config import Sampler
from dqbench.errors import check_choice
from dqbench.metrics.guards import check_finite
from dqbench.models import denoiser
from dqbench.sampling import generate, padded_length, wrapped_step
from dqbench.shards import Shards, fill

ESTIMATORS = ("paper", "official")
ELEMENTS = 8  # of each chain and step, kept for the normality test and a scatter plot
TESTABLE = 20  # elements below which scipy's normality test means nothing


@dataclass(frozen=True)
class Statistics:
    """The noise model at each of the sampler's S calls, noisiest first; k is as fitted, negative values included."""

    timesteps: np.ndarray  # [S]; some repeat
    k: np.ndarray  # [S]
    bias: np.ndarray  # [S, C]
    std: np.ndarray  # [S]
    r2: np.ndarray  # [S]: of the line D = k e + c
    p_normal: np.ndarray  # [S]: of scipy.stats.normaltest on D'; NaN where there was too little to test
    signal: np.ndarray  # [S]: root mean square of e

    @property
    def slope(self) -> np.ndarray:
        """k as it is used, [S]: never negative (the authors' release)."""
        return np.maximum(self.k, 0)

    def remaining(self, cnc: bool, bc: bool) -> np.ndarray:
        """Root mean square of what is left of the error after these corrections, [S]; e and D' uncorrelated."""
        used = self.slope * cnc
        bias = 0 if bc else np.square(self.bias).mean(axis=1)
        return np.sqrt(((self.slope - used) * self.signal) ** 2 + self.std**2 + bias) / (1 + used)

    def signal_to_noise(self, cnc: bool, bc: bool) -> np.ndarray:
        """SNR^Q = ||e|| / ||error|| after these corrections, [S] (Eq. 14); infinite where there is no error."""
        with np.errstate(divide="ignore"):
            return self.signal / self.remaining(cnc, bc)


def statistics_seeds(rows: range, seed: int) -> list[int]:
    """Generator seeds of the chains along which statistics are collected: they neither calibrate nor are scored."""
    return [named_seed(f"noise statistics/{i}", seed) for i in rows]


def collect(
    pipe: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampler: Sampler,
    chains: int,
    seeds: Callable[[range], list[int]],
    folder: Path,
) -> None:
    """Fill `folder` with sums over (e, D) of `chains` full-precision chains, resuming at the first missing batch.

    moments [N, S, 6, C]: count, sums of e, D, e^2, eD, D^2; elements [N, S, n, 3]: e, D, channel; timestep [N, S].
    """

    def produce(rows: range) -> dict[str, np.ndarray]:
        return record_errors(pipe, denoiser(quantized), sampler, seeds(rows), rows.start)

    fill(folder, chains, sampler.batch_size, produce, "noise statistics")


def record_errors(
    pipe: DiffusionPipeline, student: nn.Module, sampler: Sampler, seeds: Sequence[int], first: int
) -> dict[str, np.ndarray]:
    """One sampling pass of n chains, every network call on twice as many rows: the second half through `student`."""
    count = len(seeds)
    rows = padded_length(count, sampler)
    chain = [*range(first, first + count), *[first + count - 1] * (rows - count)]
    seeds = [*seeds, *[seeds[-1]] * (rows - count)]
    generators = [named_generator(f"residual elements/{i}", 0) for i in chain]
    steps: list[dict[str, np.ndarray]] = []

    def metering(step: Callable) -> Callable:
        def metered(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            exact, predicted = model_output.unflatten(0, (-1, 2, rows)).unbind(1)
            e, d = (values[0, :, : sample.shape[1]].double() for values in (exact, predicted - exact))
            steps.append(summary(e, d, float(timestep), generators))
            return step(interleave(exact, exact), timestep, sample, *args, **kwargs)

        return metered

    with doubled(denoiser(pipe), student, rows), wrapped_step(pipe.scheduler, metering):
        generate(pipe, sampler, seeds * 2, chain * 2)
    return {name: np.stack([part[name][:count] for part in steps], axis=1) for name in steps[0]}


def summary(e: Tensor, d: Tensor, timestep: float, generators: Sequence[torch.Generator]) -> dict[str, np.ndarray]:
    """What is kept of one step: e, D [B, C, ...] -> moments [B, 6, C], elements [B, n, 3], timestep [B]."""
    e, d = e.flatten(2), d.flatten(2)
    moments = torch.stack([torch.ones_like(e), e, d, e * e, e * d, d * d], dim=1).sum(dim=-1)
    uniform = torch.stack([torch.rand(ELEMENTS, generator=generator) for generator in generators]).to(e.device)
    index = (uniform * e[0].numel()).long()
    elements = [e.flatten(1).gather(1, index), d.flatten(1).gather(1, index), index // e.shape[2]]
    return {
        "moments": moments.cpu().numpy(),
        "elements": torch.stack([values.float() for values in elements], dim=-1).cpu().numpy(),
        "timestep": np.full(len(e), timestep),
    }


@contextmanager
def doubled(teacher: nn.Module, student: nn.Module, rows: int) -> Iterator[None]:
    """Inside: of each stack of 2 `rows` rows that `teacher` is called with, `student` takes the second half.

    Several stacks in one call are the halves of guidance.
    """
    forward = teacher.forward

    def both(*args: Any, **kwargs: Any) -> Any:
        total = len(args[0] if args else next(kwargs[name] for name in SAMPLES if name in kwargs))
        exact, predicted = (
            network(*half(args, which, rows, total), **half(kwargs, which, rows, total))
            for which, network in enumerate((forward, student))
        )
        merged = interleave(*(out[0].unflatten(0, (-1, rows)) for out in (exact, predicted)))
        return (merged,) if isinstance(exact, tuple) else type(exact)(sample=merged)

    teacher.forward = both
    try:
        yield
    finally:
        del teacher.forward


def half(value: Any, which: int, rows: int, total: int) -> Any:
    """The first (0) or second (1) half of every stack in all tensors of `total` rows inside `value`."""
    if isinstance(value, Tensor) and value.ndim and len(value) == total:
        return value.unflatten(0, (-1, 2, rows))[:, which].flatten(0, 1)
    if isinstance(value, dict):
        return {key: half(part, which, rows, total) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(half(part, which, rows, total) for part in value)
    return value


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """[G, B, ...] and [G, B, ...] -> [2 G B, ...]: stacks of the first's rows, then the second's."""
    return torch.stack([first, second], dim=1).flatten(0, 2)


def estimate(folder: Path, how: str) -> Statistics:
    """The noise model from what collect() wrote.

    k: slope of the least-squares line D = k e + c over all chains, channels and pixels of a step. `paper`: the bias is
    the mean of D' by channel, std the root of the mean over channels of its variance. `official` (the authors'
    release): the bias is the mean of D, std the mean over chains of the unbiased std of D' over channels and pixels.
    """
    check_choice("method.estimator", how, ESTIMATORS)
    moments = Shards(folder, "moments").read()
    check_finite(moments, 0)
    count, e, d, ee, ed, dd = moments.sum(axis=(0, 3)).T
    var_e, cov, var_d = ee / count - (e / count) ** 2, ed / count - e * d / count**2, dd / count - (d / count) ** 2
    k = np.divide(cov, var_e, out=np.zeros_like(cov), where=var_e > 0)
    slope = np.maximum(k, 0)
    bias, std = residual_paper(moments, slope) if how == "paper" else residual_official(moments, slope)
    return Statistics(
        timesteps=np.array(Shards(folder, "timestep")[0]),
        k=k,
        bias=bias,
        std=std,
        r2=np.divide(cov**2, var_e * var_d, out=np.zeros_like(cov), where=var_e * var_d > 0),
        p_normal=normality(Shards(folder, "elements").read(), slope, bias),
        signal=np.sqrt(ee / count),
    )


def residual_paper(moments: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bias [S, C], std [S]) of D' = D - slope e from moments [N, S, 6, C]."""
    count, e, d, ee, ed, dd = np.moveaxis(moments.sum(axis=0), 1, 0)
    k = slope[:, None]
    bias = (d - k * e) / count
    variance = (dd - 2 * k * ed + k**2 * ee) / count - bias**2
    return bias, np.sqrt(np.maximum(variance, 0).mean(axis=1))


def residual_official(moments: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bias [S, C], std [S]) as the authors' release has them; a channel's mean is no part of the bias it removes."""
    total = moments.sum(axis=0)
    count, e, d, ee, ed, dd = np.moveaxis(moments.sum(axis=3), 2, 0)
    squares = dd - 2 * slope * ed + slope**2 * ee - (d - slope * e) ** 2 / count
    return total[:, 2] / total[:, 0], np.sqrt(np.maximum(squares / (count - 1), 0)).mean(axis=0)


def normality(elements: np.ndarray, slope: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[S]: p-value of D'Agostino's and Pearson's test on D' at the kept elements [N, S, n, 3]."""
    e, d, channel = np.moveaxis(elements.astype(float), (1, 3), (1, 0)).reshape(3, elements.shape[1], -1)
    residual = d - slope[:, None] * e - np.take_along_axis(bias, channel.astype(int), axis=1)
    testable = (residual.std(axis=1) > 0) & (residual.shape[1] >= TESTABLE)
    return np.array([normaltest(r).pvalue if ok else np.nan for r, ok in zip(residual, testable, strict=True)])


def curves(statistics: Statistics, pipe: DiffusionPipeline) -> dict[str, list[float | None]]:
    """Step by step, noisiest first: the noise model, and signal to noise of the forward process and of quantization.

    snr_forward = abar / (1 - abar) (Eq. 13); snr_corrected is that after CNC and BC.
    """
    abar = pipe.scheduler.alphas_cumprod.cpu()[torch.from_numpy(statistics.timesteps).long()].double().numpy()
    lists = {
        "timestep": statistics.timesteps,
        "k": statistics.k,
        "bias_rms": np.sqrt(np.square(statistics.bias).mean(axis=1)),
        "std": statistics.std,
        "r2": statistics.r2,
        "p_normal": statistics.p_normal,
        "snr_forward": abar / (1 - abar),
        "snr_quantized": statistics.signal_to_noise(cnc=False, bc=False),
        "snr_corrected": statistics.signal_to_noise(cnc=True, bc=True),
    }
    return {name: [float(v) if np.isfinite(v) else None for v in values] for name, values in lists.items()}
