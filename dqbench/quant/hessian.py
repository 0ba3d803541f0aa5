"""Second moments of a layer's inputs, summed batch by batch, and the triangular factor that compensation works with.

A layer's weight is a matrix [O, M] that multiplies rows x [M]: tokens of a linear layer, patches of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqbench.errors import UserError


class InputStatistics:
    """Sums over the N rows x of a layer's input: x x^T, |x|, and (x_ref - x) x^T where references come along."""

    def __init__(self) -> None:
        self.count = 0
        self.products: Tensor | None = None  # [M, M], float32
        self.magnitudes: Tensor | None = None  # [M]
        self.cross: Tensor | None = None  # [M, M]

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Count rows x [N, M]; reference [N, M]: what the full-precision network has in their place."""
        x = x.float()
        if self.products is None:
            self.products, self.magnitudes = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
        self.count += len(x)
        self.products.addmm_(x.T, x)
        self.magnitudes += x.abs().sum(dim=0)
        if reference is not None:
            self.cross = torch.zeros_like(self.products) if self.cross is None else self.cross
            self.cross.addmm_((reference.float() - x).T, x)

    def hessian(self) -> Tensor:
        """H = 2/N sum x x^T, [M, M]: of the squared error of a row's outputs."""
        return self.products * (2 / self.count)

    def take(self) -> tuple[Tensor, Tensor | None]:
        """H and 2/N sum (x_ref - x) x^T, None without references, [M, M] each, in the place of the sums: only once."""
        products, cross = self.products, self.cross
        self.products = self.cross = None
        return products.mul_(2 / self.count), None if cross is None else cross.mul_(2 / self.count)

    def magnitude(self) -> Tensor:
        """Mean |x|, [M]."""
        return self.magnitudes / self.count


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as the rows [N, M] that its flattened weight [O, M] multiplies."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        what = "a grouped convolution, or one with padding of its own"
        raise UserError(f"compensation cannot follow {what} ({layer}); add the layer to method.skip")
    shape = {key: getattr(layer, key) for key in ("kernel_size", "dilation", "padding", "stride")}
    if isinstance(layer, nn.Conv1d):
        shape, x = {key: (int(key != "padding"), *value) for key, value in shape.items()}, x.unsqueeze(2)
    return F.unfold(x, **shape).transpose(1, 2).flatten(0, 1)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U [M, M], upper triangular, H^-1 = U^T U, of H + damping mean(diag H) I (GPTQ, arXiv:2210.17323, section 3.3).

    A column that is never active has H_jj = 0; it gets 1, so that it is rounded to nearest and moves nothing. U takes
    the place of H in memory, where [M, M] is the largest thing there is.
    """
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean() + (diagonal == 0)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(hessian, out=(hessian, failed))
    if not failed:
        torch.cholesky_inverse(hessian, out=hessian)
        torch.linalg.cholesky_ex(hessian, upper=True, out=(hessian, failed))
    if failed or not torch.isfinite(torch.stack(torch.aminmax(hessian))).all():
        raise UserError(f"damping={damping} leaves the inputs' second moments singular; allowed: more, e.g. 0.1")
    return hessian
