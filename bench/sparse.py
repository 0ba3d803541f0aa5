"""The product of a sparse residual with activations: dense, torch CSR, gather-scatter, and where they break even.

python -m bench.sparse prints the times over densities. Ratios are of one run; the densities of a residual are 1 to 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.table import AT_LEAST, Ratio, interleave, timed
from bench.table import show as show_ratios
from dqbench.quant.sparse_compute import PATHS, PRODUCTS, Residual, forward

DENSITIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
RHO = 0.01  # the default share of survivors
SHAPE, TOKENS = (512, 2048), 256


def sparse_weight(density: float, shape: tuple[int, int] = SHAPE) -> Tensor:
    """A normal weight [O, I] of which a random share is kept."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator) * kept


def products(weight: Tensor, columns: Tensor, rounds: int) -> dict[str, float]:
    """Median CPU seconds of R x alone, [O, I] x [I, T], by path; the matrices are ready made."""
    residual = Residual.of(weight)
    sparse = residual.csr()
    turns = {
        "dense": lambda: timed(lambda: weight @ columns, 3),
        "csr": lambda: timed(lambda: sparse @ columns, 3),
        "gather_scatter": lambda: timed(lambda: PRODUCTS["gather_scatter"](residual, columns), 3),
    }
    check(weight, columns)
    return interleave(rounds, **turns)


def check(weight: Tensor, columns: Tensor) -> None:
    """The paths agree; AssertionError otherwise."""
    expected, residual = weight.double() @ columns.double(), Residual.of(weight.double())
    for name, product in PRODUCTS.items():
        torch.testing.assert_close(product(residual, columns.double()), expected, msg=f"{name} differs from dense")


def layers(rounds: int) -> dict[str, float]:
    """Median CPU seconds of a whole linear layer at density RHO, base and residual, by path."""
    layer, x = nn.Linear(*SHAPE[::-1]), torch.randn(TOKENS, SHAPE[1])
    base, residual = torch.randn(SHAPE), Residual.of(sparse_weight(RHO))
    turns = {
        path: lambda path=path: timed(lambda: forward(layer, base, residual, x, path), 3)
        for path in PATHS
        if path != "dense"
    }
    fused = base + residual.dense()  # fake quantization bakes the sum
    with torch.no_grad():
        return interleave(rounds, dense=lambda: timed(lambda: nn.functional.linear(x, fused, layer.bias), 3), **turns)


def break_even(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """The density where `ratios`, other / dense, cross 1, by interpolation of logarithms; 0 or inf outside."""
    pairs = list(zip(densities, ratios, strict=True))
    if pairs[0][1] >= 1:
        return 0.0
    for (left, low), (right, high) in zip(pairs, pairs[1:], strict=False):
        if high >= 1:
            part = -math.log(low) / math.log(high / low)
            return math.exp(math.log(left) + part * math.log(right / left))
    return math.inf


@torch.no_grad()
def measure(quick: bool) -> dict[float, dict[str, float]]:
    """Seconds by density and path."""
    columns = torch.randn(SHAPE[1], TOKENS, generator=torch.Generator().manual_seed(1))
    densities = DENSITIES[1::2] if quick else DENSITIES  # both have RHO
    return {density: products(sparse_weight(density), columns, 3 if quick else 7) for density in densities}


def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Dense over sparse at the default density, and each path's break-even density."""
    times, whole = measure(quick), layers(3 if quick else 7)
    lines = []
    for path in PRODUCTS:
        at, crossing = times[RHO], break_even(list(times), [row[path] / row["dense"] for row in times.values()])
        detail = (
            f"dense {at['dense'] * 1e3:.2f} ms, {path} {at[path] * 1e3:.2f} ms; break-even at density {crossing:.2g}"
        )
        what = f"residual product {SHAPE[0]}x{SHAPE[1]}, {TOKENS} tokens, density {RHO}: dense / {path}"
        lines.append(Ratio(what, at["dense"] / at[path], AT_LEAST, None, detail))
        detail = f"dense sum {whole['dense'] * 1e3:.2f} ms, base + {path} {whole[path] * 1e3:.2f} ms"
        what = f"linear layer with residual, density {RHO}: dense sum / base + {path}"
        lines.append(Ratio(what, whole["dense"] / whole[path], AT_LEAST, None, detail))
    return lines, {"products": times, "layer": whole}


def show(times: dict[float, dict[str, float]], console: Console) -> None:
    """Milliseconds by density, and the break-even densities."""
    title = f"R x, R {SHAPE[0]}x{SHAPE[1]}, {TOKENS} tokens, CPU ms of one thread"
    table = Table("density", *PATHS, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for density, row in times.items():
        table.add_row(f"{density:g}", *(f"{row[path] * 1e3:.3f}" for path in PATHS))
    console.print(table)
    for path in PRODUCTS:
        crossing = break_even(list(times), [row[path] / row["dense"] for row in times.values()])
        console.print(f"{path} is faster than dense below density {crossing:.2g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ratios, seconds = bench(quick=False)
    show(seconds["products"], Console(width=140))
    show_ratios(ratios, "medians of interleaved turns", Console(width=140))
