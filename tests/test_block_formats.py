"""Block formats: their code points and scales, their bits, their bytes, and the baselines made of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqbench.config import Bits, build, compose
from dqbench.errors import UserError
from dqbench.models import denoiser
from dqbench.quant.block_formats import BlockFormat, decode, e2m1_codes, e2m1_values, encode, nearest_e2m1, round_to
from dqbench.quant.block_weights import bake, from_rows, overhead_bits, to_rows, unpack
from dqbench.quant.dynamic import BlockQuantizer
from dqbench.quant.packing import nbytes
from dqbench.quant.storage import storages
from tests.tiny import calibration, pipeline

MXFP4, NVFP4 = BlockFormat("e2m1", 32, "e8m0"), BlockFormat("e2m1", 16, "e4m3")
FORMATS = {
    "int4_token": BlockFormat("int", None, "fp16"), "int4_g64": BlockFormat("int", 64, "fp16"),
    "int4_g16": BlockFormat("int", 16, "fp16"), "mxfp4": MXFP4, "nvfp4": NVFP4,
}  # fmt: skip
POINTS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-8, 8, shape, generator=generator))


def test_e2m1_code_points():
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    bits = [(s, e, m) for s, e, m in itertools.product((0, 1), range(4), (0, 1))]
    values = [(-1) ** s * (m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1)) for s, e, m in bits]
    assert e2m1_values(torch.arange(16)).tolist() == values and values[:8] == POINTS


def test_e2m1_rounds_to_nearest_ties_to_even_and_saturates():
    x = torch.cat([torch.linspace(-8, 8, 6401), torch.tensor([5.0, 5.000001, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25])])
    found = nearest_e2m1(x)
    assert torch.equal(e2m1_values(e2m1_codes(found)), found)
    points = torch.tensor(POINTS)
    distance = (x.abs()[:, None] - points).abs()
    assert torch.equal((found.abs() - x.abs()).abs(), distance.amin(1))
    assert found[-9:].tolist() == [4.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0] and found[0] == -6
    assert e2m1_codes(nearest_e2m1(torch.tensor([-0.1]))).item() == 0  # no negative zero


@pytest.mark.parametrize(("largest", "exponent"), [(1.0, -2), (6.0, 0), (7.99, 0), (8.0, 1), (0.3, -4), (0.0, -127)])
def test_mxfp4_scale_is_a_power_of_two(largest, exponent):
    x = torch.zeros(1, 32)
    x[0, 5] = -largest
    blocks = encode(x, MXFP4, 4)
    assert blocks.scale.item() == exponent + 127
    nearest = min(POINTS, key=lambda point: abs(point - largest / 2.0**exponent))
    assert decode(blocks, MXFP4)[0, 5] == -nearest * 2.0**exponent


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no E8M0")
def test_scales_are_torch_dtypes_bit_for_bit():
    x = heavy(8, 64)
    blocks = encode(x, MXFP4, 4)
    values = blocks.scale.view(torch.float8_e8m0fnu).float()
    assert torch.equal(decode(blocks, MXFP4), e2m1_values(blocks.codes) * values.repeat_interleave(32, 1))
    blocks = encode(x, NVFP4, 4)
    assert blocks.scale.dtype == torch.float8_e4m3fn
    values = blocks.scale.float() * blocks.tensor_scale
    assert torch.equal(decode(blocks, NVFP4), e2m1_values(blocks.codes) * values.repeat_interleave(16, 1))


def test_nvfp4_scales_fill_e4m3():
    x = heavy(4, 48)
    blocks = encode(x, NVFP4, 4)
    assert blocks.tensor_scale == x.abs().max() / (448 * 6) and blocks.scale.float().max() == 448
    assert blocks.scale.float().min() >= 2**-9  # never 0, which would lose a group
    clipped = round_to(10 * x, NVFP4, 4, blocks.tensor_scale)  # a static scale saturates
    assert clipped.abs().max() <= x.abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [1, 16, 70])
def test_values_are_fixed_points_and_errors_are_bounded(name, channels):
    form, x = FORMATS[name], heavy(5, channels)
    once = round_to(x, form, 4)
    assert torch.equal(decode(encode(x, form, 4), form), once)
    again = encode(once, form, 4, encode(x, form, 4).tensor_scale)
    if form.element == "int":
        assert torch.allclose(decode(again, form), once, rtol=2e-3)  # the scale is rounded anew
        size = form.group_size or channels
        for first in range(0, channels, size):
            part = slice(first, first + size)
            assert ((once - x)[:, part].abs().amax(1) <= 0.5005 * x[:, part].abs().amax(1) / 7 + 1e-7).all()
    else:
        assert (once - x).abs().max() <= 0.26 * x.abs().max() and (once == 0).sum() >= (x == 0).sum()
    assert torch.equal(round_to(torch.zeros(2, channels), form, 4), torch.zeros(2, channels))


def test_bits():
    bits = {name: form.bits_per_element(4, 4096) for name, form in FORMATS.items()}
    assert bits == {"int4_token": 4 + 16 / 4096, "int4_g64": 4.25, "int4_g16": 5.0, "mxfp4": 4.25, "nvfp4": 4.5}
    assert MXFP4.bits_per_element(4, 40) == 4 + 2 * 8 / 40  # a short group has a whole scale
    assert overhead_bits((10, 3, 3, 3), NVFP4) == 10 * 2 * 8 + 32


def test_weight_rows_have_input_channels_innermost():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert to_rows(weight)[0].tolist() == [weight[0, i, a, b].item() for a in (0, 1) for b in (0, 1) for i in range(3)]
    assert torch.equal(from_rows(to_rows(weight), weight.shape), weight)
    for shape in ((4, 3, 1, 1), (4, 1, 3, 3)):
        assert from_rows(to_rows(torch.empty(shape)), shape).stride() == torch.empty(shape).stride()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.lists(st.integers(1, 7), min_size=2, max_size=4), st.integers(2, 8),
    st.integers(0, 99),
)  # fmt: skip
def test_packed_weights_come_back_bit_for_bit(name, shape, n_bits, seed):
    form = FORMATS[name]
    n_bits = 4 if form.element == "e2m1" else n_bits
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(heavy(*shape, seed=seed))
    bake(layer, form, n_bits)
    tensors, header = layer.weight_storage.pack(), layer.weight_storage.header()
    assert torch.equal(unpack(tensors, header), layer.weight)
    assert layer.weight.isfinite().all()
    expected = layer.weight.numel() * n_bits + overhead_bits(shape, form)
    assert 0 <= 8 * nbytes(tensors) - expected < 8
    assert len(layer.weight.unique()) <= 2**n_bits * layer.weight.shape[0] * form.groups(layer.weight[0].numel())


@pytest.mark.parametrize("axis", [1, -1])
def test_quantizers_follow_their_axis(axis):
    x = heavy(2, 20, 3, 5)
    rows = x.movedim(axis, -1)
    for form in FORMATS.values():
        quantizer = BlockQuantizer(form, 4, axis)
        if form.per_tensor:
            quantizer.observe(x)
        scale = quantizer.scale if form.per_tensor else None
        expected = torch.stack([round_to(row, form, 4, scale) for row in rows])
        assert torch.equal(quantizer(x).movedim(axis, -1), expected)  # each sample on its own
        again = BlockQuantizer.from_spec(quantizer.spec())
        again.load_state_dict(quantizer.state_dict())
        assert torch.equal(again(x), quantizer(x))


def method(name: str, *overrides: str):
    return build(compose([f"method={name}", *overrides]).method)


def error(pipe, other) -> float:
    """Relative squared error of the predicted noise."""
    batch = calibration(64, seed=1).rows(np.arange(64))
    with torch.no_grad():
        exact = denoiser(pipe)(**batch).sample
        return ((denoiser(other)(**batch).sample - exact).square().mean() / exact.square().mean()).item()


@pytest.mark.parametrize("name", FORMATS)
def test_methods_end_to_end(name):
    pipe = pipeline()
    four = method(name)(pipe, calibration(), Bits(4, 4, 4, 8))
    eight = method(name)(pipe, calibration(), Bits(4, 8, 8, 8))
    assert 0 < error(pipe, eight) < error(pipe, four) < 0.3
    assert set(storages(four.unet)) == set(four.unet.plan)
    for layer, bits in four.unet.plan.items():
        stored = 8 * nbytes(four.unet.get_submodule(layer).weight_storage.pack())
        assert 0 <= stored - four.unet.get_submodule(layer).weight.numel() * 4 - bits.weight_overhead_bits < 8
    quantizer = four.unet.conv_out.act_quantizer
    assert quantizer.form == FORMATS[name] and (name != "nvfp4" or quantizer.scale > 0)


def test_fp4_has_four_bits():
    with pytest.raises(UserError, match="bits.weight=8 with method=mxfp4, an FP4 format; allowed: 4, 16, 32"):
        method("mxfp4")(pipeline(), calibration(), Bits(8, 8, 8, 8))
    with pytest.raises(UserError, match="bits.act=6 with method=nvfp4, an FP4 format; allowed: 4, 8, 16, 32"):
        method("nvfp4")(pipeline(), calibration(), Bits(4, 6, 8, 8))
    with pytest.raises(UserError, match="e2m1 with scale=fp16 is no known format"):
        method("mxfp4", "method.weight.scale=fp16")
