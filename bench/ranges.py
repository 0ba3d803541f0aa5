"""L2.4 range search over the weights of the CIFAR-size U-Net: ours against a Python loop over output channels."""

from __future__ import annotations

from time import process_time

import torch

from bench.table import AT_LEAST, Ratio
from bench.units import BITS, network
from dqbench.quant.plan import LAYER_TYPES
from dqbench.quant.ranges import choose_qparams
from tests.reference.quantizers import mse_official, per_row

TARGET = 20


def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Ours over all channels; the loop over every `stride`-th, its seconds scaled by the channels of each layer."""
    net, stride = network("ddpm_cifar10"), 256 if quick else 64
    weights = [layer.weight.flatten(1) for layer in net.unet.modules() if isinstance(layer, LAYER_TYPES)]
    ours = loop = sampled = differing = 0.0
    for weight in weights:
        start = process_time()
        scale, zero_point = choose_qparams(weight, BITS.weight, estimator="mse")
        ours += process_time() - start
        rows = torch.arange(0, len(weight), stride)
        start = process_time()
        plain_scale, plain_zero_point = per_row(mse_official, weight[rows], BITS.weight)
        loop += (process_time() - start) * len(weight) / len(rows)
        sampled += len(rows)
        differing += int(((scale[rows] != plain_scale) | (zero_point[rows] != plain_zero_point)).sum())
    assert differing == 0, f"range search: {differing} of {sampled} channels differ from the plain loop"
    channels = sum(map(len, weights))
    detail = f"ours {ours:.1f} s, loop {loop:.0f} s from {sampled:.0f} of {channels} channels, equal"
    line = Ratio("ddpm_cifar10, range search: loop / ours", loop / ours, AT_LEAST, TARGET, detail)
    return [line], {"ours": ours, "loop": loop}
