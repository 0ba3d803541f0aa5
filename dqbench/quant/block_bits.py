"""ABMP: how many binary planes each column block of a weight gets (Quant-dLLM, arXiv:2510.03274, adaptive blockwise
mixed precision). The mean over the weights is exactly the order asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from dqbench.errors import UserError


def allocate(importance: Sequence[float], widths: Sequence[int], order: int, ratio: float) -> list[int]:
    """Orders of G blocks of `widths` columns: order - 1 for the least important, order + 1 for as many most important.

    k = floor(ratio * number of blocks) go either way; where that is 0 all keep `order`. A narrower block at the right
    edge keeps it too and is not counted: only blocks of one width can swap planes without changing the mean.
    Equal importance: the block further left is the less important one.
    """
    if not (0 <= ratio <= 0.5):
        raise UserError(f"abmp={ratio} is out of range; allowed: the share of blocks that go either way, 0 to 0.5")
    full = [g for g, width in enumerate(widths) if width == widths[0]]
    count = floor(ratio * len(full) + 1e-9)  # 0.29 * 100 is 28.999...
    orders = [order] * len(widths)
    if not count:
        return orders
    if order < 2:
        raise UserError(f"abmp={ratio} takes a plane away, of {order}; allowed with it: 2 bits or more")
    ranked = sorted(full, key=lambda g: importance[g])
    for g in ranked[:count]:
        orders[g] -= 1
    for g in ranked[-count:]:
        orders[g] += 1
    return orders
