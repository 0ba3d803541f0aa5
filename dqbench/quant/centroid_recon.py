"""Layer reconstruction of a weight in codes: fewest squared errors of the layer's output, codes and centroids in turn.

|| y - W^ x ||^2 summed over calibration inputs x of the quantized network and outputs y of the full-precision one is
tr(W^ H W^^T) - 2 tr(W^ T^T) up to a constant, H = sum x x^T [M, M], T = sum y x^T [O, M]. Both are descended exactly:
a code given all others (coordinate descent, as QuantEase, arXiv:2309.01885), a group's centroids given its codes
(weighted least squares). The error never grows; centroids are fp16 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqbench.errors import UserError, check_choice
from dqbench.quant.codebook import Codebook, Sharing, learn, overhead_bits
from dqbench.quant.kmeans import STARTS, midpoints


@dataclass
class Moments:
    """What reconstruction needs of a layer's calibration inputs and wanted outputs (without bias), summed over them."""

    second: Tensor  # H, double [M, M]
    cross: Tensor  # T, double [O, M]

    @classmethod
    def zeros(cls, layer: nn.Module) -> Moments:
        outputs, columns = layer.weight.flatten(1).shape
        options = {"dtype": torch.float64, "device": layer.weight.device}
        return cls(torch.zeros(columns, columns, **options), torch.zeros(outputs, columns, **options))

    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Take a batch of the layer's inputs and outputs into account; the layer's bias is taken off y."""
        rows, wanted = patches(layer, x).float(), outputs(layer, y).float()
        if layer.bias is not None:
            wanted = wanted - layer.bias.float()
        self.second += rows.T @ rows
        self.cross += wanted.T @ rows

    def damped(self, weight: Tensor, share: float) -> Moments:
        """With a pull towards `weight` [O, M]: share x the mean of H's diagonal; inputs that are always 0 keep it."""
        pull = share * self.second.diagonal().mean().clamp(min=1e-12)
        eye = torch.eye(len(self.second), dtype=self.second.dtype, device=self.second.device)
        return Moments(self.second + pull * eye, self.cross + pull * weight.double())


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer's weight [O, M] multiplies, [rows, M]: the input itself, or of a conv each window. x: its input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    form = {key: getattr(layer, key) for key in ("kernel_size", "dilation", "padding", "stride")}
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
        form = {key: ((1, 0)[key == "padding"], *value) for key, value in form.items()}
    return F.unfold(x, **form).transpose(1, 2).flatten(0, 1)


def outputs(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output as [rows, O], in the order of patches()."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2).flatten(0, 1)


def is_plain(layer: nn.Module) -> bool:
    """Whether every output sees all inputs through one matrix."""
    return isinstance(layer, nn.Linear) or layer.groups == 1 and layer.padding_mode == "zeros"


def objective(found: Tensor, moments: Moments) -> Tensor:
    """tr(W^ H W^^T) - 2 tr(W^ T^T) of W^ [O, M]."""
    found = found.double()
    return ((found @ moments.second - 2 * moments.cross) * found).sum()


def reconstruct(weight: Tensor, moments: Moments, start: Codebook, sweeps: int) -> Codebook:
    """`start`, a codebook for `weight` [O, M], after sweeps over all groups: codes by columns, then centroids."""
    state = _State(start, moments)
    spans = start.sharing.spans(weight.shape[1])
    for _ in range(sweeps):
        for group, span in enumerate(spans):
            state.choose_codes(group, *span)
            state.fit_centroids(group, *span)
    return replace(start, codes=state.codes, centroids=state.centroids)


class _State:
    """Codes, centroids, and the residual T - W^ H that tells how the objective changes."""

    def __init__(self, start: Codebook, moments: Moments) -> None:
        self.sharing, self.codes, self.centroids = start.sharing, start.codes.clone(), start.centroids.clone()
        self.second = moments.second.float()
        self.residual = (moments.cross - start.dequantize().double() @ moments.second).float()

    @property
    def book(self) -> Codebook:
        return Codebook(self.codes, self.centroids, self.sharing)

    def choose_codes(self, group: int, first: int, end: int) -> None:
        """The best code of each column in turn, all rows at once."""
        tables, own = self.book.tables(group), self.second[first:end, first:end]
        borders, inverse = midpoints(tables), 1 / own.diagonal().clamp(min=1e-30)
        codes = self.codes[:, first:end].T.long()
        before = tables.gather(1, codes.T).T
        now, rest = before.contiguous().clone(), self.residual[:, first:end].T.contiguous()
        for j in range(end - first):
            target = torch.addcmul(now[j], rest[j], inverse[j])
            codes[j] = (target[:, None] > borders).sum(1)
            value = tables.gather(1, codes[j][:, None])[:, 0]
            rest.addr_(own[j], value - now[j], alpha=-1)
            now[j] = value
        self.codes[:, first:end] = codes.T.to(torch.uint8)
        self.residual -= (now - before).T @ self.second[first:end]

    def fit_centroids(self, group: int, first: int, end: int) -> None:
        """The centroids of least error for the group's codes; a block of rows keeps its own if rounded ones err more.

        Per block delta = A^-1 b with A, b the sums over rows of S^T H S, S^T (T - W^ H); S [columns, 2^b] is one-hot.
        """
        own, count = self.second[first:end, first:end].double(), self.centroids.shape[2]
        chosen = F.one_hot(self.codes[:, first:end].long(), count).double()
        share = in_row_blocks(chosen.transpose(1, 2) @ own @ chosen, self.sharing.rows)
        slope = in_row_blocks((self.residual[:, first:end].double()[:, None] @ chosen)[:, 0], self.sharing.rows)
        ridge = 1e-9 * share.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-30)
        eye = torch.eye(count, dtype=share.dtype, device=share.device)
        step = torch.linalg.solve(share + ridge[:, None, None] * eye, slope)
        old = self.centroids[:, group]
        new = (old.double() + step).half()
        moved = new.double() - old.double()
        change = ((share @ moved[:, :, None])[:, :, 0] - 2 * slope).mul(moved).sum(1)
        new = torch.where((change < 0)[:, None] & new.isfinite().all(1, keepdim=True), new, old)
        before = self.book.tables(group).gather(1, self.codes[:, first:end].long())
        self._install(group, first, end, new)
        now = self.book.tables(group).gather(1, self.codes[:, first:end].long())
        self.residual -= (now - before) @ self.second[first:end]

    def _install(self, group: int, first: int, end: int, centroids: Tensor) -> None:
        """New centroids, sorted, and the codes that go with their order."""
        ordered, order = centroids.sort(dim=1, stable=True)
        rank = order.argsort(dim=1).repeat_interleave(self.sharing.rows, dim=0)[: len(self.codes)]
        self.codes[:, first:end] = rank.gather(1, self.codes[:, first:end].long()).to(torch.uint8)
        self.centroids[:, group] = ordered


def in_row_blocks(values: Tensor, rows: int) -> Tensor:
    """[O, ...] -> sums over `rows` consecutive rows, [R, ...]; the last block may be of fewer."""
    padded = torch.cat([values, values.new_zeros(-len(values) % rows, *values.shape[1:])])
    return padded.unflatten(0, (-1, rows)).sum(1)


@dataclass
class WeightCentroids:
    """How weights are coded. rows: width -> rows of a weight that share codebooks, `columns` columns each.

    start: of k-means, quantiles | bins | exact (kmeans.py); sweeps: of reconstruction, 0: k-means alone;
    damping: pull towards the weight, a share of the mean of H's diagonal; uniform_from: bits from which on grids are
    uniform.
    """

    rows: dict[str, int]
    columns: int
    start: str
    sweeps: int
    damping: float
    uniform_from: int

    def __post_init__(self) -> None:
        check_choice("method.weight.start", self.start, STARTS)
        if missing := [width for width in range(2, min(self.uniform_from, 9)) if self.rows.get(str(width), 0) < 1]:
            raise UserError(f"method.weight.rows has none for {missing[0]} bits; allowed: 1 or more for each width")
        for key, low in {"columns": 1, "sweeps": 0, "damping": 0, "uniform_from": 2}.items():
            if not low <= getattr(self, key) < float("inf"):
                raise UserError(f"method.weight.{key}={getattr(self, key)} is out of range; allowed: {low} or more")

    def sharing(self, n_bits: int, split: int = 0) -> Sharing:
        """Which weights have a codebook in common; split: a column."""
        return Sharing(self.rows[str(n_bits)], self.columns, split)

    def overhead_bits(self, shape: Sequence[int], n_bits: int) -> int:
        """Bits of the centroids of a weight of this shape, whose input is no concatenation."""
        return overhead_bits(shape, n_bits, self.sharing(n_bits))

    def code(self, weight: Tensor, n_bits: int, split: int, moments: Moments | None) -> Codebook:
        """The codebook of a weight [O, I, ...]; split: in input channels. moments None: k-means alone, unweighted."""
        flat = weight.detach().flatten(1).float()
        sharing = self.sharing(n_bits, split * (flat.shape[1] // weight.shape[1]))
        importance = flat.new_ones(flat.shape[1]) if moments is None else moments.second.diagonal().float()
        found = learn(flat, importance, n_bits, sharing, self.start)
        if moments is None or not self.sweeps:
            return found
        return reconstruct(flat, moments.damped(flat, self.damping), found, self.sweeps)

    def bake(self, layer: nn.Module, n_bits: int, split: int, moments: Moments | None) -> Codebook:
        """Replace a layer's weight by what its codes stand for, and keep how it is stored; returns the codebook."""
        found = self.code(layer.weight, n_bits, split, moments)
        found.install(layer)
        return found
