"""y = (X1 + R) x for a layer whose weight is a dense base and a sparse residual: three paths of equal results.

dense: one product with the sum, as fake quantization computes it. csr: the base dense, the residual as a torch sparse
matrix. gather_scatter: the base dense; for each entry (o, k, v) of the residual, row k of the input, times v, is added
to row o of the output. Convolutions become products by unfolding their input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqbench.errors import UserError


@dataclass(frozen=True)
class Residual:
    """Entries of a sparse weight matrix [O, K], K = columns of the unfolded input: values [E] at (rows, columns)."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, groups: int = 1) -> Residual:
        """The nonzero entries of weight [O, C / groups, ...]; a group's columns lie at its own channels."""
        flat = weight.flatten(1)
        rows, columns = flat.nonzero().unbind(1)
        own = rows // (len(flat) // groups)  # the group of an output channel
        return cls(rows, columns + own * flat.shape[1], flat[rows, columns], (len(flat), flat.shape[1] * groups))

    def csr(self) -> Tensor:
        """As a torch sparse matrix."""
        pointers = torch.bincount(self.rows, minlength=self.shape[0]).cumsum(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                F.pad(pointers, (1, 0)), self.columns, self.values, self.shape, check_invariants=True
            )

    def dense(self) -> Tensor:
        """As a dense matrix [O, K]."""
        matrix = self.values.new_zeros(self.shape)
        matrix[self.rows, self.columns] = self.values
        return matrix


def by_dense(residual: Residual, columns: Tensor) -> Tensor:
    """R x: [O, T] of columns [K, T], as a dense product."""
    return residual.dense() @ columns


def by_csr(residual: Residual, columns: Tensor) -> Tensor:
    """R x: [O, T] of columns [K, T], as a sparse product."""
    return residual.csr() @ columns


def by_gather_scatter(residual: Residual, columns: Tensor) -> Tensor:
    """R x: [O, T] of columns [K, T], entry by entry."""
    terms = columns.index_select(0, residual.columns) * residual.values.unsqueeze(1)
    return columns.new_zeros(residual.shape[0], columns.shape[1]).index_add_(0, residual.rows, terms)


PRODUCTS: dict[str, Callable[[Residual, Tensor], Tensor]] = {"csr": by_csr, "gather_scatter": by_gather_scatter}
PATHS = ("dense", *PRODUCTS)


def forward(layer: nn.Module, base: Tensor, residual: Residual, x: Tensor, path: str) -> Tensor:
    """The output of `layer`, a linear or conv layer, with the weight base + residual. base: of the weight's shape."""
    if path == "dense":
        return apply(layer, base + weight_of(layer, residual), layer.bias, x)
    rest = PRODUCTS[path](residual, unfold(layer, x))
    return apply(layer, base, layer.bias, x) + fold(layer, x, rest)


def weight_of(layer: nn.Module, residual: Residual) -> Tensor:
    """The residual as a weight of the layer's shape."""
    groups, own = getattr(layer, "groups", 1), layer.weight[0].numel()
    matrix = residual.dense()
    parts = [part[:, g * own : (g + 1) * own] for g, part in enumerate(matrix.chunk(groups))]
    return torch.cat(parts).reshape(layer.weight.shape)


def apply(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The layer's own operation with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def unfold(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs as columns [K, T]: those of a linear layer [..., K], or a conv's patches, T = B times output positions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.transposed:
        raise UserError("sparse compute needs a linear layer, or a convolution padded with zeros by a number")
    pairs = {name: pair(getattr(layer, name), fill) for name, fill in _GEOMETRY.items()}
    x = x.unsqueeze(2) if x.ndim == 3 else x
    return F.unfold(x, **pairs).transpose(0, 1).flatten(1)


_GEOMETRY = {"kernel_size": 1, "dilation": 1, "padding": 0, "stride": 1}


def pair(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    """A 1-d convolution's setting as that of a 2-d one over a height of 1."""
    return values if len(values) == 2 else (fill, *values)


def fold(layer: nn.Module, x: Tensor, product: Tensor) -> Tensor:
    """[O, T] in the shape of the layer's output for the input x."""
    if isinstance(layer, nn.Linear):
        return product.T.reshape(*x.shape[:-1], len(product))
    sizes = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return product.reshape(len(product), len(x), *sizes).transpose(0, 1)
