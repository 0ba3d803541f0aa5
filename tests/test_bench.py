"""The benchmark compares the same maths: both sides agree before anything is timed."""

from __future__ import annotations

import pytest

from bench import equality
from bench.table import AT_LEAST, AT_MOST, Ratio
from bench.units import Network, cases
from tests.tiny import pipeline, recon

UNITS = ("conv_in", "up_blocks.1.resnets.0", "mid_block.attentions.0")  # a layer, a split shortcut, attention


@pytest.mark.parametrize("name", UNITS)
def test_ours_and_plain_learn_the_same(name, tmp_path):
    net = Network(pipeline().unet, ["*.resnets.?", "*.attentions.?"], ["up_blocks.*.conv_shortcut"])
    settings = recon(iters=6, iters_act=5, warmup=0.0, lr=1e-2, bound_steps=False)
    case = next(cases(net, [name], settings, 24, tmp_path))
    equality.check(case)


@pytest.mark.parametrize(
    "value, direction, verdict",
    [(2.6, AT_LEAST, "reached"), (2.4, AT_LEAST, "missed"), (1.5, AT_MOST, "reached"), (1.7, AT_MOST, "missed")],
)
def test_verdict_follows_the_direction(value, direction, verdict):
    assert Ratio("", value, direction, 2.5 if direction == AT_LEAST else 1.6, "").verdict == verdict
