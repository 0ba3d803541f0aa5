"""RT+ZS: the two stages, every threshold rule, exact storage, three equal compute paths, and the method itself."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.sparse import break_even
from dqbench.config import Bits, build, compose
from dqbench.cost import notes, qparam_bytes, weight_bytes
from dqbench.errors import UserError
from dqbench.models import anatomy, attach_anatomy, denoiser
from dqbench.quant.attach import installed
from dqbench.quant.attention import attention_layers
from dqbench.quant.packing import nbytes
from dqbench.quant.residual import Codebook, StageOne, Zeros, grid
from dqbench.quant.residual_acts import Meter, TwoStageQuantizer, collecting, metering, two_stage_quantizers
from dqbench.quant.residual_weights import Layout, TwoStageWeight, scopes_of, two_stage
from dqbench.quant.sparse_compute import PATHS, Residual, forward, weight_of
from dqbench.quant.storage import Packed, load_storages, save_storages, storages, stored_bits, unpack
from dqbench.quant.thresholds import SCOPES, Threshold, expected_share, survivors, tau_of
from tests.tiny import calibration, pipeline

NONE = Zeros("step", 0.0)
DEAD_ZONE = Codebook("dead_zone", 4, "tensor")
AUTO = Layout("auto", "auto")
W4A8 = Bits(4, 8, 8, 8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int) -> torch.Tensor:
    """Student's t with 4 degrees of freedom."""
    return normal(*shape) / (sum(normal(*shape, seed=k + 1).square() for k in range(4)) / 4).sqrt()


def quantize(x: torch.Tensor, **changes: object) -> TwoStageWeight:
    """x [O, M] in two stages: 4 bits, symmetric, 97 % of groups of 128, and the largest 1 % of the residual."""
    values = {"stage": StageOne(4, True, 97, 128), "threshold": Threshold("quantile", 0.01, "tensor")}
    values |= {"codebook": DEAD_ZONE, "zeros": NONE}
    return two_stage(x, **values | changes)


def error(x: torch.Tensor, found: TwoStageWeight) -> float:
    return ((found.dequantize() - x).square().mean() / x.square().mean()).item()


def bits(found: TwoStageWeight, layout: Layout = AUTO) -> float:
    return stored_bits(found.storage(found.codes.float(), layout)) / found.codes.numel()


BY_GROUP = Codebook("uniform_sym", 4, "group")  # one 16-bit number for each 128 weights


@pytest.mark.parametrize(
    "source, percentile, expected",
    [(normal, 97, 0.0083), (heavy_tailed, 97, 0.0124), (normal, 99, 0.0101), (heavy_tailed, 99, 0.0161)],
)
def test_error_and_bits_of_a_clipped_base_with_one_percent_residual(source, percentile, expected):
    x = source(512, 2048)
    found = quantize(x, stage=StageOne(4, True, percentile, 128), codebook=BY_GROUP)
    assert error(x, found) == pytest.approx(expected, rel=0.015)
    assert bits(found, Layout("dense", "blk8")) == pytest.approx(4.40, abs=0.006)
    assert bits(found) < 4.39  # run lengths of a fitting width are shorter


@pytest.mark.parametrize("source, plain, dominated", [(normal, 0.0138, 0.0095), (heavy_tailed, 0.0376, 0.0207)])
def test_without_clipping_a_residual_does_not_pay(source, plain, dominated):
    """INT4 g128, and with 10 % residual in 2 bits; at as many bits INT5 g128 is .0030 and .0084."""
    x, unclipped = source(512, 2048), StageOne(4, True, 100, 128)
    none = quantize(x, stage=unclipped, threshold=Threshold("quantile", 0.0, "tensor"))
    assert error(x, none) == pytest.approx(plain, rel=0.015) and bits(none, Layout("dense", "auto")) < 4.1251
    tenth = quantize(
        x,
        stage=unclipped,
        threshold=Threshold("quantile", 0.1, "channel"),
        codebook=Codebook("dead_zone", 2, "channel"),
    )
    five = quantize(x, stage=StageOne(5, True, 100, 128), threshold=Threshold("quantile", 0.0, "tensor"))
    assert error(x, tenth) == pytest.approx(dominated, rel=0.015) and error(x, five) < 0.45 * error(x, tenth)
    assert bits(five, Layout("dense", "auto")) < bits(tenth, Layout("dense", "auto")) + 0.26


def test_step_rule_keeps_exactly_what_is_clipped():
    x = heavy_tailed(64, 300)
    clipped = Threshold("step", 1.0, "tensor")
    for n_bits in (2, 4, 8):
        assert not quantize(x, stage=StageOne(n_bits, True, 100, 128), threshold=clipped).support.any()
    found = quantize(x, threshold=clipped)
    scale = found.spread(found.scale.float())
    assert found.support.any() and torch.equal(found.support, (x / scale).abs() > 7.5 * (1 + 2**-10 / 7.5))


@pytest.mark.parametrize("kind, n_bits", [("dead_zone", 4), ("dead_zone", 1), ("uniform_sym", 3), ("uniform_asym", 2)])
def test_all_survive_is_dense_two_stage(kind, n_bits):
    """rho = 1 against the formulas written out, one codebook per channel."""
    x = normal(16, 256)
    found = quantize(x, threshold=Threshold("quantile", 1.0, "tensor"), codebook=Codebook(kind, n_bits, "channel"))
    r, half = x - found.base(), 2 ** (n_bits - 1)
    magnitude, top = r.abs(), r.abs().amax(1, keepdim=True)
    if kind == "uniform_sym":
        step = (top / (half - 1)).half().float()
        expected = (r / step).round().clamp(1 - half, half - 1) * step
    elif kind == "uniform_asym":
        low = r.amin(1, keepdim=True)
        low, step = low.half().float(), ((r.amax(1, keepdim=True) - low) / (2 * half - 1)).half().float()
        expected = low + ((r - low) / step).round().clamp(0, 2 * half - 1) * step
    elif n_bits == 1:
        expected = r.sign() * magnitude.mean(1, keepdim=True)
    else:
        low = magnitude.amin(1, keepdim=True)
        low, step = low.half().float(), ((top - low) / half).half().float()
        expected = r.sign() * (low + (((magnitude - low) / step).floor().clamp(0, half - 1) + 0.5) * step)
    torch.testing.assert_close(found.dequantize() - found.base(), expected, rtol=1e-3, atol=1e-3)
    assert bits(found, Layout("dense", "dense")) == pytest.approx(
        4 + 16 / 128 + n_bits + (1 if kind == "uniform_sym" else 2) * 16 / 256, abs=0.01
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_threshold_rules_in_their_scopes(scope):
    x = heavy_tailed(8, 300).abs()
    scale, rows = torch.ones(1, 1), {"tensor": [x.flatten()], "channel": list(x)}
    rows["group"] = [part for row in x for part in row.split(128)]
    kept = {rule: survivors(x, scale, Threshold(rule, value, scope), 128) for rule, value in RULES.items()}
    cut = {
        name: [part for row in s.split(128, 1) for part in row] if scope == "group" else s for name, s in kept.items()
    }
    counts = {name: sorted(int(part.sum()) for part in (s if scope != "tensor" else [s])) for name, s in cut.items()}
    assert counts["quantile"] == sorted(round(0.1 * len(row)) for row in rows[scope])
    assert counts["l2"] == sorted(int((row > 1.5 * row.square().mean().sqrt()).sum()) for row in rows[scope])
    assert counts["l1"] == sorted(int((row > 2 * row.mean()).sum()) for row in rows[scope])
    assert counts["abs"] == sorted(int((row > 1.2).sum()) for row in rows[scope])
    for row in rows[scope]:
        square = row.double().square()
        part = square[row > tau_of(row.unsqueeze(0), Threshold("energy", 0.6, scope))]
        assert part.sum() >= 0.6 * square.sum() > part.sum() - part.min()


RULES = {"quantile": 0.1, "l2": 1.5, "l1": 2.0, "energy": 0.6, "abs": 1.2}


@pytest.mark.parametrize("rule", ["quantile", "energy"])
def test_shares_of_nothing_and_of_all(rule):
    x = normal(4, 50)
    for share, count in ((0.0, 0), (1.0, x.numel())):
        assert int(survivors(x, torch.ones(1, 1), Threshold(rule, share, "channel"), 50).sum()) == count


def test_rd_rule_is_the_best_trade_of_its_price():
    """No quantile has a smaller error + price * bits; a higher price keeps fewer."""
    x = heavy_tailed(64, 1024)
    price, codebook = 0.003, Codebook("dead_zone", 4, "channel")

    def total(found: TwoStageWeight) -> float:
        return error(x, found) + price * 12 * found.support.float().mean().item()

    found = quantize(x, threshold=Threshold("rd", price, "tensor"), codebook=codebook)
    shares = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
    others = [quantize(x, threshold=Threshold("quantile", rho, "tensor"), codebook=codebook) for rho in shares]
    assert total(found) < min(map(total, others))
    prices = [Threshold("rd", price, "tensor") for price in (1e-3, 1e-2, 1e-1, 10.0)]
    counts = [int(quantize(x, threshold=rule, codebook=codebook).support.sum()) for rule in prices]
    assert counts[0] > 1.2 * counts[1] > 1.4 * counts[2] > counts[3], counts


def test_effective_zeros():
    x = normal(32, 256)
    plain = quantize(x)
    for rule in ("step", "percentile"):
        assert torch.equal(quantize(x, zeros=Zeros(rule, 0.0)).dequantize(), plain.dequantize())
    for value in (0.5, 1.0):
        assert torch.equal(quantize(x, zeros=Zeros("step", value)).codes, plain.codes)
    wide = quantize(x, zeros=Zeros("step", 3.0))
    assert set(wide.codes.unique().abs().tolist()) == {0, 3, 4, 5, 6, 7} and torch.equal(wide.support, plain.support)
    half = quantize(x, zeros=Zeros("percentile", 50.0))
    assert (half.codes == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert bits(half) < bits(plain) - 0.5  # a suppressed zero takes a bit of a mask instead of four


def test_scales_are_kept_in_16_bits_only_where_those_suffice():
    for factor, dtype in ((1.0, torch.float16), (1e-6, torch.float32), (1e7, torch.float32)):
        found = quantize(normal(8, 256) * factor)
        assert found.scale.dtype == dtype and error(normal(8, 256) * factor, found) < 0.012


weights = st.tuples(
    st.sampled_from([(1, 1), (1, 200), (3, 5, 3, 3), (7, 130), (4, 1, 3, 3), (5, 300)]),
    st.sampled_from(["dead_zone", "uniform_sym", "uniform_asym"]),
    st.sampled_from(SCOPES),
    st.booleans(),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([0.0, 40.0]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@given(weights)
@settings(max_examples=150)
def test_storage_is_bit_exact_whatever_the_weight(case):
    shape, kind, scope, symmetric, n_bits, rest, rho, zeros, dtype = case
    weight = heavy_tailed(*shape).to(dtype)
    weight[0] = 0  # a row without a scale
    flat = weight.float().flatten(1)
    found = two_stage(
        flat,
        StageOne(n_bits, symmetric, 90, 128),
        Threshold("quantile", rho, scope),
        Codebook(kind, rest, scope),
        Zeros("percentile", zeros),
    )
    storage = found.storage(weight, AUTO)
    back = unpack(storage.pack(), json.loads(json.dumps(storage.header())))
    assert back.dtype == dtype and torch.equal(back, found.dequantize().reshape(shape).to(dtype))
    assert all(values.device.type == "cpu" for values in storage.pack().values())


def test_damaged_storage_is_refused(tmp_path):
    layer = nn.Linear(300, 8)
    layer.weight_storage = quantize(layer.weight.detach()).storage(layer.weight, AUTO)
    storage = layer.weight_storage
    altered = {**storage.pack(), "scale": storage.pack()["scale"] * 2}
    for tensors, header, message in (
        (altered, storage.header(), "truncated or altered"),
        (storage.pack(), {**storage.header(), "bits": 5}, "truncated or altered"),
        (storage.pack(), {**storage.header(), "kind": "two"}, "kind two is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            unpack(tensors, header)
    with pytest.raises(UserError, match="version 9"):
        newer = Packed.of("two_stage", storage.pack(), {**storage.header(), "version": 9})
        unpack(newer.pack(), newer.header())

    net, file = nn.Sequential(layer), tmp_path / "storage.safetensors"
    save_storages(net, file)
    content, twin = file.read_bytes(), nn.Sequential(nn.Linear(300, 8))
    load_storages(twin, file)
    (loaded,) = storages(twin).values()
    assert torch.equal(unpack(loaded.pack(), loaded.header()), unpack(storage.pack(), storage.header()))
    for damaged in (content[:-5], content[:20], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or altered") as error:
            load_storages(twin, file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(20, 12), (2, 5, 20)),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
        (nn.Conv2d(6, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2, bias=False), (2, 6, 9, 7)),
        (nn.Conv1d(4, 6, 3, padding=1, stride=2), (3, 4, 11)),
    ],
)
def test_three_paths_are_equal(layer, shape):
    layer, x = layer.double(), normal(*shape).double()
    found = quantize(layer.weight.detach().float().flatten(1), threshold=Threshold("quantile", 0.2, "tensor"))
    base, rest = (part.double().reshape(layer.weight.shape) for part in (found.base(), found.correction()))
    residual = Residual.of(rest, getattr(layer, "groups", 1))
    assert len(residual.values) == found.support.sum() and torch.equal(weight_of(layer, residual), rest)
    outputs = {path: forward(layer, base, residual, x, path) for path in PATHS}
    layer.weight.data = base + rest
    for path, output in outputs.items():
        torch.testing.assert_close(output, layer(x), rtol=1e-12, atol=1e-12, msg=path)


def test_break_even_is_where_the_curves_cross():
    assert break_even([0.01, 0.1, 1.0], [0.1, 1.0, 10.0]) == pytest.approx(0.1)
    assert break_even([0.01, 1.0], [0.1, 10.0]) == pytest.approx(0.1)
    assert break_even([0.1, 1.0], [2.0, 20.0]) == 0 and break_even([0.1, 1.0], [0.1, 0.9]) == np.inf


def method(name: str = "rtzs", *overrides: str):
    return build(compose([f"method={name}", *overrides]).method)


def act_quantizer(x: torch.Tensor, n_bits: int = 4, *overrides: str) -> TwoStageQuantizer:
    quantizer = TwoStageQuantizer(n_bits, method("rtzs", *overrides).act)
    with collecting([quantizer]):
        assert torch.equal(quantizer(x), x)
    return quantizer


def test_static_activations_follow_calibration_and_are_metered():
    x = heavy_tailed(64, 512)
    settings = ["method.act.percentiles=[97]", "method.act.symmetric=true"]
    quantizer = act_quantizer(x, 4, *settings)
    with metering([quantizer]) as (meter,):
        y = quantizer(x)
    assert (y - x).square().mean() / x.square().mean() == pytest.approx(
        error(x, quantize(x, stage=StageOne(4, True, 97, x.numel()))), rel=0.3
    )
    assert meter.elements == x.numel() and meter.entries == pytest.approx(0.01 * x.numel(), rel=0.15)
    assert 0.08 < meter.overhead_bits < 0.14 and quantizer.meter is None and quantizer.sample is None
    plain = act_quantizer(x, 4, *settings, "method.act.threshold.value=0")
    assert (plain(x) - x).square().mean() > 2 * (y - x).square().mean()
    scale = plain.grids().scale
    assert torch.equal(plain(x), (x / scale).round().clamp(-7, 7) * scale)


def test_of_several_percentiles_the_best_is_taken():
    x, mean = heavy_tailed(64, 512), {}
    for percentiles in ("[95]", "[97]", "[100]", "[95,97,100]"):
        y = act_quantizer(x, 4, f"method.act.percentiles={percentiles}")(x)
        mean[percentiles] = (y - x).square().mean().item()
    assert mean["[95,97,100]"] == min(mean.values()) < 0.9 * mean["[100]"]
    layer = method("rtzs", "method.weight.percentiles=[97,100]").weight
    found = layer.quantize(x, 4, layer.threshold)
    assert error(x, found) == min(
        error(x, quantize(x, stage=StageOne(4, False, p, 128), codebook=layer.codebook)) for p in (97, 100)
    )


@pytest.mark.parametrize(("n_bits", "percentile"), [(4, 98), (8, 100)])
def test_dynamic_activations_depend_on_their_sample_alone(n_bits, percentile):
    x = heavy_tailed(8, 4, 5, 5) * torch.logspace(-4, 1, 8).reshape(-1, 1, 1, 1)
    own = ["method.act.dynamic=true", f"method.act.percentiles=[{percentile}]"]
    quantizer = TwoStageQuantizer(n_bits, method("rtzs", *own).act)
    y = quantizer(x)
    assert all(torch.equal(quantizer(x[k : k + 1]), y[k : k + 1]) for k in range(8))
    assert ((y - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max() < 0.25


@pytest.mark.parametrize("kind", ["dead_zone", "uniform_sym", "uniform_asym"])
@pytest.mark.parametrize("rule", ["quantile", "step", "l2", "energy"])
def test_act_quantizer_is_rebuilt_from_its_description(kind, rule):
    x = normal(16, 100)
    own = [f"method.act.codebook.kind={kind}", f"method.act.threshold.rule={rule}", "method.act.threshold.value=0.5"]
    quantizer = act_quantizer(x, 4, *own, "method.act.zeros={rule: percentile, value: 20}")
    spec = json.loads(json.dumps(quantizer.spec()))
    assert spec["kind"] == "two_stage"
    twin = TwoStageQuantizer.from_spec(spec)
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(x), quantizer(x)) and not torch.equal(twin(x), x)


@pytest.fixture(scope="module")
def quantized():
    pipe = pipeline()
    return pipe, method()(pipe, calibration(), W4A8)


def test_method_bakes_what_it_stores_and_bills_every_byte(quantized):
    pipe, result = quantized
    found = storages(result.unet)
    assert set(found) == set(result.unet.plan) and set(pipe.unet.state_dict()) <= set(result.unet.state_dict())
    for name, storage in found.items():
        layer, own = result.unet.get_submodule(name), result.unet.plan[name]
        assert torch.equal(unpack(storage.pack(), storage.header()), layer.weight)
        billed = weight_bytes(type("Line", (), {"name": name, "weights": layer.weight.numel()}), result.unet.plan)
        assert billed == nbytes(storage.pack()) and own.weight == 4 and own.act == 8
        assert own.act_overhead_bits > 0 or isinstance(layer, nn.Linear)
    assert len(two_stage_quantizers(result.unet)) == len(found)


def test_method_is_close_and_shows_its_sparsity(quantized):
    pipe, result = quantized
    batch = calibration(32, seed=1).rows(np.arange(32))
    exact, found = (denoiser(p)(**batch).sample for p in (pipe, result))
    assert 0 < (found - exact).square().mean() < 0.05 * exact.square().mean()
    shown = result.unet.diagnostics
    assert list(shown) == [
        "weights: share of zeros", "weights: stored bits", "weights: error",
        "activations: share of zeros", "activations: stored bits",
    ]  # fmt: skip
    group = shown["weights: share of zeros"]
    assert group["x_label"] == "layer" and len(group["x"]) == len(result.unet.plan)
    assert all(0.97 < share <= 1 for share in group["lines"]["residual"])
    assert all(4 < value < 12 for value in shown["weights: stored bits"]["lines"]["per weight"])


@pytest.mark.parametrize("name", ["rtzs", "rtzs_literal"])
def test_expected_bill_is_near_the_measured_one(name):
    pipe = pipeline()
    built, count = method(name), lambda layer: pipe.unet.get_submodule(layer).weight.numel()
    expected = built.plan(copy.deepcopy(pipe.unet).to("meta"), W4A8)
    measured = built(pipe, calibration(), W4A8).unet.plan
    totals = [
        sum(own.weight * count(layer) + own.weight_overhead_bits for layer, own in plan.items())
        for plan in (expected, measured)
    ]
    assert expected.keys() == measured.keys() and totals[0] == pytest.approx(totals[1], rel=0.03)
    acts = [np.mean([own.act + own.act_overhead_bits for own in plan.values()]) for plan in (expected, measured)]
    assert acts[0] == pytest.approx(acts[1], rel=0.06)


def test_storages_survive_a_saved_network(quantized, tmp_path):
    pipe, result = quantized
    save_storages(result.unet, tmp_path / "storage.safetensors")
    twin = pipeline().unet
    load_storages(twin, tmp_path / "storage.safetensors")
    for name, storage in storages(twin).items():
        assert torch.equal(unpack(storage.pack(), storage.header()), result.unet.get_submodule(name).weight)
    assert len(storages(twin)) == len(result.unet.plan)


def test_literal_is_eight_bits_and_more_whatever_is_asked():
    pipe = pipeline()
    unet = method("rtzs_literal")(pipe, calibration(), Bits(4, 4, 8, 8)).unet
    assert {(own.weight, own.act) for own in unet.plan.values()} == {(8, 8)}
    total = sum(8 * nbytes(storage.pack()) for storage in storages(unet).values())
    assert total / sum(unet.get_submodule(name).weight.numel() for name in unet.plan) > 8.5
    off = method("rtzs_literal")(pipe, calibration(), Bits(32, 32, 32, 32)).unet
    assert not storages(off) and not two_stage_quantizers(off) and not off.plan and not off.diagnostics


SOME = ["method.weight.percentiles=[98]", "method.skip=[up_*, down_*]"]


def searched(n_bits: int, *overrides: str, batch_size: int = 64):
    """The tiny network's weights under rule=calib with a budget of 1 bit per weight."""
    own = [*SOME, "method.weight.search={grid: [0, 0.02, 0.1, 0.5], budget: 1.0, rows: 4}"]
    own += ["method.weight.threshold.rule=calib"]
    rows = dataclasses.replace(calibration(), batch_size=batch_size)
    built = method("rtzs", *own, *overrides)
    return built(pipeline(), rows, Bits(n_bits, 32, 32, 32)).unet


@pytest.mark.parametrize("n_bits", [4, 6, 8])
def test_calibrated_shares_add_no_more_than_the_budget_at_any_width(n_bits):
    """Beside the same layer without a residual: of 10 % and 50 % only the first fits into one bit."""
    unet, plain = searched(n_bits), searched(n_bits, "method.weight.search.grid=[0]")
    shares = set()
    for name, storage in storages(unet).items():
        count = unet.get_submodule(name).weight.numel()
        none = stored_bits(plain.get_submodule(name).weight_storage)
        shares.add(round(storage.header()["residual"]["entries"] / count, 2))
        assert none <= stored_bits(storage) <= none + count, name
    assert max(shares) == 0.1


def test_the_search_does_not_depend_on_the_batch():
    whole, parts = searched(4).state_dict(), searched(4, batch_size=3).state_dict()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


@pytest.mark.parametrize("rule", ["quantile", "calib"])
def test_a_short_scope_keeps_one_element_at_least(rule):
    x = heavy_tailed(8, 300)
    for scope, size, count in (("group", 16, 8 * 19), ("channel", 16, 8 * 3), ("tensor", 16, 24)):
        kept = survivors(x, torch.ones(1, 1), Threshold(rule, 0.01, scope), size)
        assert int(kept.sum()) == count
        shares = [
            n * times * expected_share(Threshold(rule, 0.01, scope), n) for n, times in scopes_of(8, 300, scope, size)
        ]
        assert sum(shares) == pytest.approx(count)
        assert not survivors(x, torch.ones(1, 1), Threshold(rule, 0.0, scope), size).any()


def test_weights_of_no_elements_are_refused_by_name():
    pipe = pipeline()
    pipe.unet.extra = nn.Linear(0, 4)
    for name in ("rtzs", "int4_g64", "quartz"):
        with pytest.raises(UserError, match="cannot be quantized: extra; add them to method.skip"):
            method(name)(pipe, calibration(), W4A8)
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="is empty"):
            quantize(torch.zeros(shape))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ("scale", "tau", "low", "step")),
        (["method.act.codebook.kind=uniform_sym"], ("scale", "tau", "step")),
        (["method.act.codebook.bits=1"], ("scale", "tau", "low")),
        (["method.act.zeros={rule: percentile, value: 20}"], ("scale", "tau", "low", "step", "dead")),
        (["method.act.zeros={rule: step, value: 2}", "method.act.symmetric=true"], ("scale", "tau", "low", "step")),
    ],
)
def test_static_parameters_are_stored_once_and_billed(overrides, names):
    quantizer = act_quantizer(x := heavy_tailed(64, 512), 4, *overrides)
    assert quantizer.rule.stored == names and quantizer.scale.shape == (len(names),)
    chosen = quantizer.choose(x.reshape(1, -1), quantizer.rule.percentiles[0])
    assert chosen._fields == quantizer.grids()._fields
    stored = 8 * nbytes({"scale": quantizer.scale}) + 4 * quantizer.zero_point.numel()
    billed = 8 * qparam_bytes(len(names), 4)
    assert stored <= billed <= stored + 4 * len(names)
    own = method("rtzs", *overrides).plan(pipeline().unet, W4A8)["conv_out"]
    assert own.act_groups == len(names)


def test_what_dynamic_activations_make_for_each_sample_is_billed():
    x, own = heavy_tailed(8, 64), ["method.act.dynamic=true", "method.act.percentiles=[98]"]
    bits = {}
    for share in (0.0, 0.05):
        built = method("rtzs", *own, f"method.act.threshold.value={share}")
        quantizer = TwoStageQuantizer(4, built.act)
        with metering([quantizer]) as (meter,):
            quantizer(x)
        bits[share] = meter.overhead_bits
        assert quantizer.scale.numel() == quantizer.zero_point.numel() == 0
    assert bits[0.0] == (3 * 32 + 4) / 64  # scale, low and step; a zero point
    assert bits[0.05] > bits[0.0] + 0.05 * 4
    unet = built(pipeline(), calibration(), W4A8).unet
    assert {own.act_groups for own in installed(unet, W4A8)[0].values()} == {0}


@pytest.mark.parametrize(("n_bits", "scope"), [(3, "channel"), (4, "tensor"), (8, "group")])
def test_the_bill_before_a_run_is_a_bound(n_bits, scope):
    """rule=quantile, stage 1 dense: never more than what is stored, and little less."""
    pipe, bits = pipeline(), Bits(n_bits, 32, 32, 32)
    built = method("rtzs", f"method.weight.threshold={{rule: quantile, value: 0.05, scope: {scope}}}", *SOME)
    expected = built.plan(copy.deepcopy(pipe.unet).to("meta"), bits)
    stored = built(pipe, calibration(), bits).unet.plan
    bound, real = (sum(own.weight_overhead_bits for own in plan.values()) for plan in (expected, stored))
    assert all(own.weight_overhead_bits <= stored[name].weight_overhead_bits + 8 for name, own in expected.items())
    weights = sum(pipe.unet.get_submodule(name).weight.numel() for name in stored)
    assert bound <= real <= bound + 0.15 * weights
    cfg = compose(["method=rtzs", f"bits.weight={n_bits}"])
    assert "A bound" in notes(cfg)[0] and not notes(compose(["method=rtn"]))


@pytest.mark.parametrize(
    "override, message",
    [
        ("method.weight.threshold.rule=top", "threshold.rule=top is unknown"),
        ("method.weight.threshold.value=1.5", "out of range for rule=quantile"),
        ("method.weight.codebook.bits=9", "codebook.bits=9"),
        ("method.weight.percentiles=[0]", "percentiles"),
        ("method.act.dynamic=true", "give one of"),
        ("method.weight.group_size=null", "group_size"),
        ("method.weight.format=coo", "coo is unknown"),
        ("method.act.threshold.rule=rd", "rule=rd is for weights"),
        ("method.act.codebook.scope=channel", "scope=tensor"),
        ("method.weight.search.grid=[2]", "search.grid"),
        ("method.weight.search.budget=-1", "search.budget=-1"),
    ],
)
def test_bad_settings_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        method("rtzs", override)


def test_meter_of_nothing_is_zero():
    assert Meter().overhead_bits == 0 and dataclasses.asdict(Meter())["entries"] == 0


def test_a_range_of_zeros_takes_the_extremes_of_either_side():
    x = torch.zeros(2, 128)
    x[0, 5], x[1, 7] = -5.0, 3.0
    scale, zero_point = grid(x, 4, False, 97)
    codes = (x / scale + zero_point).round().clamp(0, 15)
    torch.testing.assert_close((codes - zero_point) * scale, x)


@pytest.mark.parametrize("key", ["weight.bits", "act.bits"])
def test_widths_of_stage_1_are_checked(key):
    with pytest.raises(UserError, match=f"method.{key}=9 is not supported"):
        method("rtzs", f"method.{key}=9")


class Idle(torch.nn.Module):
    """A network with a layer that its forward leaves out."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.idle, self.dtype = inner, torch.nn.Linear(8, 8), inner.dtype
        self.config = inner.config

    def forward(self, sample, timestep):
        return self.inner(sample, timestep)


def test_a_layer_that_never_runs_is_named_as_the_reason():
    pipe = pipeline()
    attach_anatomy(pipe, anatomy(pipe))
    pipe.unet = Idle(pipe.unet)
    with pytest.raises(UserError, match="a layer did not run on the calibration set; keep it out with method.skip"):
        method("rtzs", "method.act.dynamic=false", *SOME)(pipe, calibration(), W4A8)


def test_the_literal_reading_fixes_the_widths_of_layers_and_leaves_those_of_attention():
    result = method("rtzs_literal", *SOME)(pipeline(), calibration(), Bits(4, 4, 6, 8))
    processors = [attn.processor for attn in attention_layers(result.unet).values()]
    assert {processor.quantizers["q"].n_bits for processor in processors} == {6}
    assert {(own.weight, own.act) for own in result.unet.plan.values()} == {(8, 8)}
