"""Error against stored bits, element by element, of 4-bit formats on synthetic tensors.

python -m dqbench.studies.rate_distortion [results=DIR] [json=PATH]

Relative mean squared error, sum (x - x^)^2 / sum x^2. Activations: 512 tokens of 4096 channels, each token with its own
scale. Weights: 512 x 2048, fp16 scales of groups of 128 where nothing else is said. Seeded: always the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Laplace, StudentT
from torch.nn.functional import gelu, silu

from dqbench.commands import command
from dqbench.quant.block_formats import BlockFormat, round_to
from dqbench.quant.dynamic import LzsForm, LzsQuantizer
from dqbench.quant.lzs_theory import Theory, check
from dqbench.quant.residual import Codebook, StageOne, Zeros
from dqbench.quant.residual_weights import Layout, two_stage
from dqbench.quant.storage import stored_bits
from dqbench.quant.thresholds import Threshold
from dqbench.studies.page import arguments, save, save_json, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "rate_distortion"
SEED = 0
TOKENS, CHANNELS = 512, 4096
WEIGHTS = (512, 2048)
OUTLIERS, TIMES = 0.005, 20.0  # share of the channels, and how much larger they are
INT8, INT4 = (BlockFormat("int", None, "fp16"), 8), (BlockFormat("int", None, "fp16"), 4)
BLOCKS = {
    "INT8 per token": INT8,
    "INT4 per token": INT4,
    "INT4 g64": (BlockFormat("int", 64, "fp16"), 4),
    "INT4 g16": (BlockFormat("int", 16, "fp16"), 4),
    "MXFP4 g32": (BlockFormat("e2m1", 32, "e8m0"), 4),
    "NVFP4 g16": (BlockFormat("e2m1", 16, "e4m3"), 4),
}
LZS = [(size, rounding) for size in (16, 32) for rounding in ("truncate", "nearest", "midpoint")]
RTN = [(4, 128), (4, 64), (4, 32), (5, 128), (8, 128)]  # bits, group
TWO_STAGE = [  # bits of stage 1, percentile it clips at, share of residuals, their bits
    (4, 100.0, 0.10, 2),
    (4, 97.0, 0.01, 4),
    (4, 99.0, 0.01, 4),
    (8, 100.0, 0.01, 4),
]


@dataclass(frozen=True)
class Point:
    """A format on one tensor: stored bits per element, relative mean squared error."""

    bits: float
    error: float


Points = dict[str, dict[str, Point]]  # format -> tensor -> point


def activations(seed: int) -> dict[str, Tensor]:
    """Tensors [512, 4096], drawn one after the other from one generator."""
    shape = (TOKENS, CHANNELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = {"gauss": torch.randn(shape), "laplace": Laplace(0.0, 1.0).sample(shape)}
        found["t3"] = StudentT(3.0).sample(shape)
        outliers = torch.randn(shape)
        outliers[:, torch.rand(CHANNELS) < OUTLIERS] *= TIMES
        found["gauss, outlier channels"] = outliers
        found["gelu(2 gauss)"] = gelu(2 * torch.randn(shape))
        found["silu(2 gauss) gauss"] = silu(2 * torch.randn(shape)) * torch.randn(shape)
    return found


def weights(seed: int) -> dict[str, Tensor]:
    """Matrices [512, 2048]: light and heavy tails."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"gauss": torch.randn(WEIGHTS), "t4": StudentT(4.0).sample(WEIGHTS)}


def relative_error(x: Tensor, rounded: Tensor) -> float:
    """sum (x - rounded)^2 / sum x^2."""
    return ((x - rounded).double().square().sum() / x.double().square().sum()).item()


def activation_points(tensors: Mapping[str, Tensor]) -> Points:
    """Every activation format on every tensor."""
    found = {}
    for name, (form, n_bits) in BLOCKS.items():
        bits = form.bits_per_element(n_bits, CHANNELS)
        found[name] = on_each(tensors, lambda x, f=form, b=n_bits, s=bits: (s, round_to(x, f, b)))
    for size, rounding in LZS:
        quantizer = LzsQuantizer(LzsForm(size, rounding, "absmax", "per_token"), 4, -1)
        bits = 4 + quantizer.overhead_bits(CHANNELS)
        found[f"QuaRTZ G{size} {rounding}"] = on_each(tensors, lambda x, q=quantizer, s=bits: (s, q(x)))
    return found


def weight_points(tensors: Mapping[str, Tensor]) -> Points:
    """Round to nearest, and two stages with the residual in the smallest sparse format, on every matrix."""
    found = {}
    for n_bits, size in RTN:
        form = BlockFormat("int", size, "fp16")
        bits = form.bits_per_element(n_bits, WEIGHTS[1])
        found[f"INT{n_bits} g{size}"] = on_each(tensors, lambda x, f=form, b=n_bits, s=bits: (s, round_to(x, f, b)))
    for setting in TWO_STAGE:
        for scope in ("channel", "group"):
            name = "INT{} clip {:g} % + {:.0%} INT{}".format(*setting).replace("clip 100 %", "unclipped")
            found[f"{name}, per {scope}"] = on_each(tensors, lambda x, s=setting, c=scope: in_two_stages(x, s, c))
    return found


def on_each(tensors: Mapping[str, Tensor], form: Callable[[Tensor], tuple[float, Tensor]]) -> dict[str, Point]:
    """`form`: x -> (stored bits per element, what it becomes)."""
    points = {}
    for name, x in tensors.items():
        bits, rounded = form(x)
        points[name] = Point(bits, relative_error(x, rounded))
    return points


def in_two_stages(x: Tensor, setting: tuple[int, float, float, int], scope: str) -> tuple[float, Tensor]:
    """(stored bits per element, x in two stages); `scope` of the residual's codebook."""
    n_bits, percentile, share, residual_bits = setting
    threshold, codebook = Threshold("quantile", share, "tensor"), Codebook("dead_zone", residual_bits, scope)
    stage = StageOne(n_bits, True, percentile, 128)
    found = two_stage(x, stage, threshold, codebook, Zeros("step", 0.0))
    return stored_bits(found.storage(x, Layout("dense", "auto"))) / x.numel(), found.dequantize()


def theory(tensors: Mapping[str, Tensor]) -> dict[str, Theory]:
    """QuaRTZ's argument on every tensor, at G = 16, truncated."""
    return {name: check(x, LzsForm(16, "truncate", "absmax", "per_token"), -1) for name, x in tensors.items()}


def points_table(points: Points) -> str:
    """Formats down, tensors across; bits as a range where they depend on the tensor."""
    names = list(next(iter(points.values())))
    rows = []
    for form, found in points.items():
        bits = sorted({f"{point.bits:.2f}" for point in found.values()})
        rows.append([form, " to ".join(bits), *(f"{found[name].error:#.3g}" for name in names)])
    return table(["format", "bits / element", *names], rows)


def theory_table(found: Mapping[str, Theory]) -> str:
    """Tensors down."""
    header = ["tensor", "P(\\|q\\| >= 8)", "LZS / s8", "INT4 / s8", "F = 4", "entropy LZS", "entropy INT4"]
    rows = [
        [name, *(f"{value:.2f}" for value in (t.large, t.lzs, t.int4, t.flags[4], t.entropy, t.entropy_int4))]
        for name, t in found.items()
    ]
    return table(header, rows)


def draw(panels: Sequence[tuple[str, Points, str]]) -> Figure:
    """A panel for each (title, points, tensor): error against bits; formats of equal panels have one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 9), layout="constrained")
    labels: dict[str, Any] = {}
    for axes, (title, points, name) in zip(figure.subplots(2, 4).flatten(), panels, strict=True):
        draw_panel(axes, {form: found[name] for form, found in points.items() if found[name].bits < 6})
        axes.set(title=title, xlabel="stored bits / element", ylabel="relative MSE", yscale="log")
        axes.grid(alpha=0.3)
        labels |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside right center", fontsize="small")
    return figure


def draw_panel(axes: Axes, points: Mapping[str, Point]) -> None:
    """A color and a marker for each format; those of 8 bits are left to the table."""
    from matplotlib import colormaps

    for index, (form, point) in enumerate(points.items()):
        marker = "s" if form.startswith("QuaRTZ") else "D" if "%" in form else "o"
        color = colormaps["tab20"](index)
        axes.plot(point.bits, point.error, color=color, marker=marker, linestyle="", markersize=8, label=form)


@command
def main(argv: list[str]) -> None:
    """Compute, write the page, say where it is."""
    results, path = arguments(argv)
    tensors, matrices = activations(SEED), weights(SEED)
    acts, stored, checked = activation_points(tensors), weight_points(matrices), theory(tensors)
    panels = [(name, acts, name) for name in tensors] + [(f"weights, {name}", stored, name) for name in matrices]
    parts = ["# Rate and distortion", __doc__.split("\n\n")[2].strip(), "## Activations", points_table(acts)]
    parts += ["## QuaRTZ's argument, G = 16, truncated, errors in steps of stage 1", theory_table(checked)]
    parts += ["## Weights", points_table(stored), "per channel, per group: scope of the residual's codebook."]
    for file in save(Path(results) / "tables", NAME, parts, draw(panels)):
        print(file)
    save_json(path, as_json({"activations": acts, "weights": stored}, checked))


def as_json(points: Mapping[str, Points], checked: Mapping[str, Theory]) -> dict[str, Any]:
    """Everything that the page shows, unrounded."""
    shown = {
        part: {form: {name: asdict(point) for name, point in found.items()} for form, found in forms.items()}
        for part, forms in points.items()
    }
    return {**shown, "theory": {name: asdict(found) for name, found in checked.items()}}


if __name__ == "__main__":
    main()
