"""QuaRTZ: leading-zero suppression number by number, its bytes, its integer matmul, and the method."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, gelu, pad

from dqbench.config import Bits, build, compose
from dqbench.errors import UserError
from dqbench.models import denoiser
from dqbench.quant import zero_suppression as lzs
from dqbench.quant.attention import attention_layers
from dqbench.quant.dynamic import LzsForm, LzsQuantizer
from dqbench.quant.lzs_theory import check, theory_check
from dqbench.quant.storage import storages, stored_bits
from tests.tiny import calibration, pipeline

LARGEST_ERROR = {0: 0, 1: 1, 2: 3, 3: 7, 4: 15}  # of truncation, by flag


def form(**changes: object) -> LzsForm:
    return LzsForm(**{"group_size": 16, "rounding": "truncate", "range": "absmax", "scale": "per_token"} | changes)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Codes whose groups have all flags: uniform over a random power of two."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 ** torch.randint(1, 8, (*shape[:-1], 1), generator=generator)
    return torch.randint(-127, 128, shape, generator=generator) % width * (2 * torch.randint(0, 2, shape) - 1)


def clz32_flag(magnitudes: list[int]) -> int:
    """max(29 - clz32(OR), 0), on Python integers."""
    together = 0
    for magnitude in magnitudes:
        together |= magnitude
    return max(29 - (32 - together.bit_length()), 0)


@pytest.mark.parametrize(
    ("largest", "flag"), [(0, 0), (7, 0), (8, 1), (15, 1), (16, 2), (31, 2), (32, 3), (63, 3), (64, 4), (127, 4)]
)
def test_flag_table(largest, flag):
    assert lzs.choose_flags(torch.tensor([0, -largest, 0]), 3).tolist() == [flag]


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=40), st.integers(1, 17))
def test_flag_of_the_or_is_the_flag_of_the_largest(codes, group_size):
    groups = [codes[first : first + group_size] for first in range(0, len(codes), group_size)]
    expected = [clz32_flag([abs(code) for code in group]) for group in groups]
    assert lzs.choose_flags(torch.tensor(codes), group_size).tolist() == expected


@pytest.mark.parametrize(
    ("codes", "flag", "decoded"),
    [([3, -2, 5, 0], 0, [3, -2, 5, 0]), ([100, 3, -2, 10], 4, [96, 0, 0, 0]), ([-20, 9, 4, -3], 2, [-20, 8, 4, 0])],
)
def test_worked_examples(codes, flag, decoded):
    codes = torch.tensor(codes)
    assert lzs.choose_flags(codes, 4).item() == flag
    assert lzs.zero_suppress(codes, 4, "truncate").tolist() == decoded


def test_error_of_every_code_under_every_flag():
    codes = torch.arange(-127, 128)
    for flag, largest in LARGEST_ERROR.items():
        reach = (8 << flag) - 1
        own = codes[codes.abs() <= reach]
        groups = torch.stack([own, torch.full_like(own, reach)], dim=1)
        errors = {r: (lzs.zero_suppress(groups, 2, r) - groups)[:, 0].abs() for r in lzs.ROUNDINGS}
        assert errors["truncate"].max() == largest and (errors["truncate"] == 0).all() == (flag == 0)
        assert torch.equal(errors["truncate"], own.abs() % 2**flag)
        assert errors["nearest"].max() <= max(largest, 0) and errors["nearest"].mean() <= errors["truncate"].mean()
        assert errors["midpoint"][own.abs() >= 2**flag].max() == (2**flag - 1) / 2


def test_nearest_and_midpoint_formulas():
    codes = torch.arange(-127, 128)
    step = 16
    magnitude = codes.abs()
    groups = torch.stack([codes, torch.full_like(codes, 127)], dim=1)
    nearest, midpoint = (lzs.zero_suppress(groups, 2, r)[:, 0] for r in ("nearest", "midpoint"))
    assert torch.equal(nearest, codes.sign() * (magnitude / step).round().clamp(max=7) * step)
    whole = magnitude // step
    assert torch.equal(midpoint, codes.sign() * torch.where(whole > 0, whole * step + 7.5, 0.0))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 20), st.integers(0, 99))
def test_packing_round_trips_on_any_shape(shape, group_size, seed):
    codes = random_codes(*shape, seed=seed)
    flags = lzs.choose_flags(codes, group_size)
    short = lzs.suppress(codes, flags, group_size, "truncate")
    packed = lzs.pack(short, flags)
    count, groups = codes.numel(), flags.numel()
    assert packed["codes"].numel() == -(-count // 2) and packed["flags"].numel() == -(-3 * groups // 8)
    again = lzs.unpack(packed, shape, group_size)
    assert torch.equal(again[0], short) and torch.equal(again[1], flags)


def test_bytes_are_two_codes_and_three_bits_per_flag():
    codes, flags = torch.tensor([[1, -7], [0, -1]], dtype=torch.int8), torch.tensor([4, 1, 2, 3, 0, 4, 4, 1])
    packed = lzs.pack(codes, flags)
    assert packed["codes"].tolist() == [0xF1, 0x90]  # the first code low, bit 3 the sign
    assert int.from_bytes(bytes(packed["flags"].tolist()), "little") == sum(
        int(f) << 3 * i for i, f in enumerate(flags)
    )
    with pytest.raises(UserError, match="truncated or altered"):
        lzs.unpack({**packed, "codes": packed["codes"][:-1]}, (2, 2), 1)


def test_bits_per_element():
    assert lzs.bits_per_element(4096, 16) == 4.1875 and lzs.bits_per_element(4096, 32) == 4.09375
    assert lzs.bits_per_element(17, 16) == 4 + 6 / 17  # a short group has a whole flag
    codes = random_codes(64, 96)
    flags = lzs.choose_flags(codes, 16)
    packed = lzs.pack(lzs.suppress(codes, flags, 16, "truncate"), flags)
    assert 8 * sum(part.numel() for part in packed.values()) / codes.numel() == 4.1875
    assert LzsQuantizer(form(), 4, -1).overhead_bits(4096) == 0.1875 + 16 / 4096
    assert LzsQuantizer(form(scale="per_tensor"), 4, -1).overhead_bits(4096) == 0.1875
    assert LzsQuantizer(form(range="minmax"), 8, -1).overhead_bits(64) == 0.5


@pytest.mark.parametrize("rounding", lzs.ROUNDINGS)
@pytest.mark.parametrize(("inputs", "group_size"), [(64, 16), (50, 16), (7, 32), (33, 1)])
def test_integer_matmul_is_the_dequantized_one_exactly(rounding, inputs, group_size):
    codes = random_codes(9, inputs)
    weight = torch.randint(-127, 128, (5, inputs), generator=torch.Generator().manual_seed(1))
    flags = lzs.choose_flags(codes, group_size)
    short = lzs.suppress(codes, flags, group_size, rounding)
    product = lzs.integer_matmul(short, flags, weight, group_size, rounding)
    dequantized = lzs.restore(short, flags, group_size, rounding).double() @ weight.double().T
    assert product.dtype == torch.int32
    assert torch.equal(product.double() / (2 if rounding == "midpoint" else 1), dequantized)


def test_fake_quantized_linear_and_conv_are_integer_matmuls_with_scales():
    """Powers of two as scales, so that floating point adds nothing of its own; a conv is one matmul for each tap."""
    quantizer, weight = LzsQuantizer(form(), 4, 1), torch.randint(-7, 8, (3, 20, 2, 2)).float()
    x = random_codes(2, 4, 4, 20).float()
    x[..., 0] = 127  # the largest code of every token: its scale is the power of two that follows
    x = (x * 2.0 ** torch.randint(-6, 6, (2, 4, 4, 1))).movedim(-1, 1)
    rows = x.movedim(1, -1)
    codes, scale, _ = quantizer.codes(rows)
    flags = lzs.choose_flags(codes, 16)
    short, total = lzs.suppress(codes, flags, 16, "truncate"), 0
    for i, j in np.ndindex(2, 2):
        window = (slice(None), slice(i, 3 + i), slice(j, 3 + j))
        own = [part[window].flatten(0, 2) for part in (short, flags, scale)]
        total = total + lzs.integer_matmul(own[0], own[1], weight[:, :, i, j].int(), 16, "truncate") * own[2]
    expected = conv2d(quantizer(x).double(), weight.double()).movedim(1, -1).flatten(0, 2)
    assert torch.equal(total.double(), expected)


@pytest.mark.parametrize("tensor", ["gauss", "gelu", "outliers", "constant", "zeros"])
@pytest.mark.parametrize("size", [16, 32])
def test_nearest_is_never_worse_than_truncation(tensor, size):
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    made = {"gelu": gelu(x), "outliers": x * (1 + 20 * (torch.arange(200) % 50 == 0)), "constant": torch.ones(3, 200)}
    x = {"gauss": x, "zeros": torch.zeros(3, 200), **made}[tensor]
    nearest, truncated = (LzsQuantizer(form(group_size=size, rounding=r), 4, -1)(x) for r in ("nearest", "truncate"))
    assert (nearest - x).square().sum() <= (truncated - x).square().sum()
    assert torch.isfinite(nearest).all() and (tensor != "zeros" or (nearest == 0).all())


def test_ranges_on_a_one_sided_tensor():
    x = gelu(3 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    error = {r: (LzsQuantizer(form(range=r), 8, -1)(x) - x).abs().max() for r in ("absmax", "minmax", "minmax_noshift")}
    assert error["minmax"] < error["absmax"] < 0.1 * error["minmax_noshift"]  # without its centre it saturates at half
    step = (x.amax(1) - x.amin(1)) / 255
    assert ((LzsQuantizer(form(range="minmax"), 8, -1)(x) - x).abs().amax(1) <= 0.6 * step).all()


def test_tokens_of_convs_are_pixels_and_layout_does_not_matter():
    x = torch.randn(2, 20, 3, 5)
    by_pixel = LzsQuantizer(form(), 4, -1)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    found = LzsQuantizer(form(), 4, 1)(x)
    assert torch.equal(found, by_pixel) and found.is_contiguous()
    assert torch.equal(LzsQuantizer(form(), 4, 1)(x[:1]), found[:1])  # a sample is on its own
    padded = LzsQuantizer(form(), 4, 1)(pad(x, (0, 0, 0, 0, 0, 12)))
    assert torch.equal(padded[:, :20], found)  # a short last group is one with zeros behind


def test_theory_of_two_tensors():
    spread, peaked = torch.zeros(1, 32), torch.zeros(1, 32)
    spread[0] = torch.tensor([127.0, *[20.0] * 31])
    peaked[0] = torch.tensor([127.0, *[1.0] * 31])
    assert check(spread, form(), -1).large == 1 and check(peaked, form(), -1).large == 1 / 32
    found = check(peaked, form(), -1)
    assert found.flags == [0.5, 0, 0, 0, 0.5]
    assert found.lzs == pytest.approx(30 / 32)
    assert found.entropy == pytest.approx(5 / 32 + 1 / 2 + 15 / 32 * math.log2(32 / 15))  # codes 7, 1 and 0


@pytest.mark.parametrize("scale", ["per_token", "per_tensor"])
def test_theory_check_is_the_same_in_batches(scale):
    unet, layers, seen = pipeline().unet, ["conv_in", "conv_out", "time_embedding.linear_1"], []
    handle = unet.conv_in.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    whole, parts = (
        theory_check(unet, layers, replace(calibration(), batch_size=size), form(scale=scale), 10) for size in (64, 4)
    )
    handle.remove()
    assert seen == ([10, 4, 4, 2] if scale == "per_token" else [10, 10, 4, 4, 2, 4, 4, 2])
    for name, group in whole.items():
        for line, values in group["lines"].items():
            assert len(values) == 3 and parts[name]["lines"][line] == pytest.approx(values, rel=1e-4, abs=1e-6)


def error(pipe, other) -> float:
    """Relative squared error of the predicted noise."""
    batch = calibration(64, seed=1).rows(np.arange(64))
    with torch.no_grad():
        exact = denoiser(pipe)(**batch).sample
        return ((denoiser(other)(**batch).sample - exact).square().mean() / exact.square().mean()).item()


def method(*overrides: str, name: str = "quartz"):
    return build(compose([f"method={name}", *overrides]).method)


def test_method_end_to_end():
    pipe = pipeline()
    errors = {}
    for name in ("quartz", "quartz_nearest"):
        result = method(name=name)(pipe, calibration(), Bits(4, 4, 4, 8))
        errors[name] = error(pipe, result)
    stage_1 = error(pipe, method()(pipe, calibration(), Bits(4, 8, 8, 8)))
    assert 0 < stage_1 < errors["quartz_nearest"] < errors["quartz"] < 0.5
    unet, plan = result.unet, result.unet.plan
    assert unet.conv_in.act_quantizer.n_bits == plan["conv_in"].act == 8  # one channel
    layer = plan["mid_block.resnets.0.conv1"]
    assert (layer.act, layer.act_overhead_bits) == (4, 3 / 16 + 16 / 32)
    assert all(stored_bits(item) > 4 * unet.get_submodule(name).weight.numel() for name, item in storages(unet).items())
    processor = next(iter(attention_layers(unet).values())).processor
    assert {part: quantizer.n_bits for part, quantizer in processor.quantizers.items()} == {
        "q": 4, "k": 4, "v": 4, "softmax": 8
    }  # fmt: skip
    groups = unet.diagnostics
    assert {len(values) for group in groups.values() for values in group["lines"].values()} == {len(plan)}
    shares = np.array(list(groups["LZS: share of flags"]["lines"].values()))
    assert np.allclose(shares.sum(0), 1, atol=1e-4)


def test_static_scales_hold_the_calibration_set():
    observed = LzsQuantizer(form(scale="per_tensor", range="minmax"), 4, -1)
    for x in ([-1.0, 3.0], [-0.5, 0.5]):
        observed.observe(torch.tensor(x))
    assert observed.scale.tolist() == pytest.approx([4 / 255, 1.0], rel=1e-3)
    result = method("method.act.scale=per_tensor")(pipeline(), calibration(), Bits(32, 8, 32, 32))
    seen = []
    quantizer = result.unet.conv_out.act_quantizer
    quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    result.unet(**calibration().rows(np.arange(24)))
    assert quantizer.scale[0] == pytest.approx(max(seen).item() / 127, rel=0.05) and quantizer.scale[1] == 0
    assert result.unet.plan["conv_out"].act_groups == 2 and result.unet.plan["conv_out"].act_overhead_bits == 0
    again = LzsQuantizer.from_spec(quantizer.spec())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x := torch.randn(1, 16, 4, 4)), quantizer(x))


@pytest.mark.parametrize(("overrides", "bits"), [([], (4, 6, 8, 8)), ([], (4, 4, 6, 8))])
def test_other_widths_are_refused_in_one_line(overrides, bits):
    with pytest.raises(UserError, match=r"=6 with method=quartz; allowed: 4 \(LZS\), 8"):
        method(*overrides)(pipeline(), calibration(), Bits(*bits))
    method("method.attention=false").check_bits(Bits(4, 4, 6, 8))


def test_a_users_override_comes_after_the_methods_own_for_narrow_layers():
    built = method("+method.overrides.conv_in={weight: 6}", "+method.overrides.conv_out={act: 32}")
    plan = built(pipeline(), calibration(), Bits(4, 4, 4, 8)).unet.plan
    assert (plan["conv_in"].weight, plan["conv_in"].act) == (6, 8)  # one channel: 8-bit inputs, unless told otherwise
    assert plan["conv_out"].act == 32 and plan["conv_out"].weight == 4
