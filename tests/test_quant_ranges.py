"""The choice of ranges: vectorised searches against the slow reference, recorded codes, running ranges, guards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dqbench.config import build, compose
from dqbench.errors import UserError
from dqbench.quant import ranges
from dqbench.quant.functional import fake_quantize, qrange, quantize
from dqbench.quant.quantizers import ActRule, Observer, WeightRule
from dqbench.quant.ranges import choose_qparams
from dqbench.schedulers import make_scheduler
from tests.reference import quantizers as ref
from tests.tiny import ddim

GOLDEN = Path(__file__).parent / "data" / "quantizers.safetensors"


def rows(count: int, length: int, seed: int = 0) -> Tensor:
    """Random rows of very different magnitude; the first eight are one-sided, zero, constant, tiny, dead or sparse."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, generator=generator) * torch.randn(count, 1, generator=generator).mul(2).exp()
    x[0], x[1], x[2], x[3], x[4] = x[0].abs(), -x[1].abs(), 0, 0.7, -0.7
    x[5], x[6] = x[5] / x[5].abs().max() * 1e-9, x[6] * 1e-25
    x[7, 1:] = 0
    return x


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [7, 576])
def test_searches_equal_the_slow_reference(bits: int, length: int) -> None:
    x = rows(11, length, seed=bits)
    for symmetric, always_zero in [(False, False), (True, False), (False, True)]:
        kind = {"symmetric": symmetric, "always_zero": always_zero}
        expected = ref.per_row(ref.mse_official, x, bits, **kind)
        assert_same(choose_qparams(x, bits, estimator="mse", official=True, **kind), expected)
    sane = choose_qparams(x, bits, estimator="mse", symmetric=True)
    assert_same(sane, ref.per_row(ref.mse_symmetric_sane, x, bits))
    for side, official, values in [(0, True, x), (0, False, x), (1, True, x.abs()), (-1, False, -x.abs())]:
        expected = ref.per_row(ref.ptq4dm, values, bits, side, official)
        assert_same(choose_qparams(values, bits, estimator="ptq4dm", official=official), expected)


@pytest.mark.parametrize("official, reference", [(True, ref.minmax_official), (False, ref.minmax_sane)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_equals_python_floats(bits: int, official: bool, reference) -> None:
    x = rows(40, 9, seed=bits)
    for symmetric, always_zero, scaled in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]:
        estimator = "scaled_minmax" if scaled else "minmax"
        kind = {"symmetric": bool(symmetric), "always_zero": bool(always_zero)}
        expected = ref.per_row(reference, x, bits, scaled=bool(scaled), **kind)
        assert_same(choose_qparams(x, bits, estimator=estimator, official=official, **kind), expected)


def test_candidates_the_approximate_ranking_cannot_separate_are_scored_exactly() -> None:
    """Many rows of few values, whose best candidates differ by a few float32 roundings."""
    x = torch.randint(-3, 4, (300, 24), generator=torch.Generator().manual_seed(5)).float() * 0.1
    expected = ref.per_row(ref.mse_official, x, 4)
    assert_same(choose_qparams(x, 4, estimator="mse", official=True), expected)


def test_recorded_codes() -> None:
    recorded = load_file(GOLDEN)
    for name in {key.removesuffix(".codes") for key in recorded if key.endswith(".codes")}:
        estimator, _, variant = name.split(".")[0].partition("_")
        bits, symmetric = int(name.split(".")[1]), variant == "symmetric"
        x = recorded["x"].abs() if variant == "positive" else recorded["x"]
        scale, zero_point = choose_qparams(x, bits, estimator=estimator, symmetric=symmetric, official=True)
        assert_same((scale, zero_point), (recorded[f"{name}.scale"], recorded[f"{name}.zero_point"]))
        codes = quantize(x, scale[:, None], zero_point[:, None], *qrange(bits, symmetric))
        assert torch.equal(codes, recorded[f"{name}.codes"].int()), name
    assert GOLDEN.stat().st_size < 100_000


@pytest.mark.parametrize("bits, share", [(8, 0.86), (4, 0.88)])
def test_ptq4dm_zero_point_is_decided_by_float32_noise(bits: int, share: float) -> None:
    recorded = load_file(GOLDEN)
    limits = recorded["limits"]
    _, zero_point = ranges.ptq4dm_qparams(-limits, limits, bits, official=True)
    assert torch.equal(zero_point, recorded[f"limits.{bits}.zero_point"].float())
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    _, zero_point = ranges.ptq4dm_qparams(-many, many, bits, official=True)
    half = 2 ** (bits - 1)
    assert set(zero_point.tolist()) == {half, half - 1}
    assert (zero_point == half).float().mean().item() == pytest.approx(share, abs=0.01)
    assert (ranges.ptq4dm_qparams(-many, many, bits)[1] == half).all()


def test_sane_minmax_covers_every_value_where_the_release_clips() -> None:
    x = torch.linspace(10, 12, 50).unsqueeze(0)
    for official, worst in [(True, 9.0), (False, 12 / 255)]:
        scale, zero_point = choose_qparams(x, 8, estimator="minmax", official=official)
        error = (fake_quantize(x, scale, zero_point, 0, 255) - x).abs().max()
        assert error > worst if official else error <= worst


def test_symmetric_mse_of_the_release_loses_half_of_the_values() -> None:
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)) * 2
    error = {}
    for official in (True, False):
        scale, zero_point = choose_qparams(x, 8, estimator="mse", symmetric=True, official=official)
        error[official] = (fake_quantize(x, scale, zero_point, -128, 127) - x).square().mean().item()
    assert error[True] > 1 and error[False] < 1e-3


@pytest.mark.parametrize("estimator", ["minmax", "scaled_minmax", "percentile", "mse", "ptq4dm"])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_rows_get_a_usable_grid(estimator: str, official: bool, symmetric: bool) -> None:
    x = rows(9, 30)
    scale, zero_point = choose_qparams(x, 4, estimator=estimator, symmetric=symmetric, official=official)
    assert scale.shape == zero_point.shape == (9,) and scale.dtype == zero_point.dtype == torch.float32
    assert (scale > 0).all() and zero_point.isfinite().all() and torch.equal(zero_point, zero_point.round())
    bounds = qrange(4, symmetric and estimator != "ptq4dm")
    y = fake_quantize(x, scale[:, None], zero_point[:, None], *bounds)
    assert y.isfinite().all() and (y[2] == 0).all()
    if not official:
        assert (scale >= ranges.SCALE_FLOOR).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse", "ptq4dm"])
def test_values_that_are_not_finite_are_refused(estimator: str, bad: float) -> None:
    x = torch.ones(2, 5)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_qparams(x, 8, estimator=estimator)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'entropy'.*minmax"):
        choose_qparams(torch.ones(1, 2), 8, estimator="entropy")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8), power=st.integers(-12, 12))
def test_search_is_no_worse_than_minmax_and_scales_with_its_input(seed: int, bits: int, power: int) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + 0.1
    scale, zero_point = choose_qparams(x, bits, estimator="mse", official=True)
    scaled = choose_qparams(x * 2.0**power, bits, estimator="mse", official=True)
    assert torch.equal(scaled[0], scale * 2.0**power) and torch.equal(scaled[1], zero_point)

    def score(scale: Tensor, zero_point: Tensor) -> Tensor:
        q = fake_quantize(x, scale[:, None], zero_point[:, None], 0, 2**bits - 1)
        return (q - x).abs().pow(2.4).mean(dim=1)

    assert (score(scale, zero_point) <= score(*choose_qparams(x, bits, estimator="minmax")) * (1 + 1e-4)).all()


def test_percentile_is_the_nearest_rank() -> None:
    x = torch.arange(101.0).flip(0).unsqueeze(0) - 20
    low, high = ranges.percentile_range(x, 95)
    assert (low.item(), high.item()) == (-15, 75)
    assert_same(ranges.percentile_range(x, 100), ranges.extremes(x))


def test_running_ranges_follow_the_release() -> None:
    batches = torch.randn(6, 1, 100, generator=torch.Generator().manual_seed(4)) + 0.5
    low, high = ranges.extremes(batches[0])
    slow_low, slow_high = batches[0].min(), batches[0].max()
    for batch in batches:
        low, high = ranges.blend((low, high), ranges.extremes(batch), 0.95)
        slow_low = slow_low * 0.95 + batch.min() * (1 - 0.95)
        slow_high = slow_high * 0.95 + batch.max() * (1 - 0.95)
    assert low.item() == slow_low.item() and high.item() == slow_high.item()
    assert_same(ranges.range_qparams(low, high, 8), ((high - low) / 255, torch.round(-low / ((high - low) / 255))))
    largest = torch.maximum(low.abs(), high.abs())
    assert_same(ranges.range_qparams(low, high, 8, symmetric=True), (largest / 127, torch.zeros(1)))
    assert_same(ranges.range_qparams(low, high, 8, always_zero=True), (high / 255, torch.zeros(1)))
    assert_same(ranges.range_qparams(torch.zeros(1), torch.zeros(1), 8), (torch.tensor([1e-8]), torch.zeros(1)))


def test_ptq4dm_activation_range_blends_searched_ranges() -> None:
    batches = torch.randn(4, 1, 500, generator=torch.Generator().manual_seed(6))
    running = ranges.ptq4dm_range(batches[0], 8, official=True)
    for batch in batches:
        found = ranges.ptq4dm_range(batch, 8, side=0, official=True)
        assert found[0] == -found[1]
        running = ranges.blend(running, found, 0.9)
    first = ranges.ptq4dm_range(batches[0], 8, official=True)[1]
    rest = [ranges.ptq4dm_range(batch, 8, official=True)[1] for batch in batches[1:]]
    expected = 0.729 * first + sum(0.1 * 0.9 ** (2 - i) * high for i, high in enumerate(rest))
    torch.testing.assert_close(running[1], expected)
    assert ranges.sidedness(batches[0].abs()) == 1 and ranges.sidedness(-batches[0].abs()) == -1
    low, high = ranges.ptq4dm_range(batches[0].abs(), 8)
    assert low == 0 and ranges.ptq4dm_qparams(low, high, 8)[1] == 0
    low, high = ranges.ptq4dm_range(-batches[0].abs(), 8)
    assert high == 0 and ranges.ptq4dm_qparams(low, high, 8)[1] == 255


@pytest.mark.parametrize("official", [True, False])
def test_ptq4dm_keeps_the_side_that_the_first_batch_shows(official: bool) -> None:
    rule = ActRule("ptq4dm", True, "ema_search", 0.9, False, official)
    generator = torch.Generator().manual_seed(7)
    two_sided = torch.randn(400, generator=generator)
    for first, side, zero_point in [(two_sided.abs(), 1, 0), (-two_sided.abs(), -1, 255)]:
        observer = Observer(rule, 8)
        batches = [first, two_sided * 2, -first]
        high = low = None
        for batch in batches:  # [0, T] or [-T, 0] throughout, whatever later batches hold
            scale, chosen = observer.observe(batch)
            new = ranges.ptq4dm_range(batch.reshape(1, -1), 8, side=side, official=official)
            low, high = new if low is None else ranges.blend((low, high), new, 0.9)
        assert_same(observer.range, (low, high))
        assert chosen == zero_point and scale == (high - low).div(255)
    observer = Observer(rule, 8)
    for batch in (two_sided, two_sided.abs()):  # two-sided stays two-sided
        _, chosen = observer.observe(batch)
        assert observer.range[0] == -observer.range[1] and chosen in (127, 128)


def act(**changes: object) -> ActRule:
    return replace(ActRule("minmax", True, "first", 0.0, False, False), **changes)


def weight(**changes: object) -> WeightRule:
    return replace(WeightRule("per_channel", None, "minmax", False, False), **changes)


@pytest.mark.parametrize(
    "rule, changes, message",
    [
        (act, {"over": "all", "estimator": "mse"}, "over=all cannot be combined with estimator=mse; allowed: minmax"),
        (act, {"over": "ema_search"}, "over=ema_search .*estimator=minmax; allowed: ptq4dm"),
        (act, {"over": "ema", "estimator": "ptq4dm"}, "over=ema .*estimator=ptq4dm; allowed: minmax"),
        (act, {"estimator": "ptq4dm", "symmetric": False}, "estimator=ptq4dm .*allowed with it: symmetric=true"),
        (act, {"over": "last"}, "over=last is unknown; allowed: first, all, ema, ema_search"),
        (act, {"momentum": 1.0}, "momentum=1.0 is out of range"),
        (act, {"momentum": -0.1}, "momentum=-0.1 is out of range"),
        (act, {"momentum": float("nan")}, "momentum=nan is out of range"),
        (weight, {"estimator": "minimax"}, "estimator=minimax is unknown; allowed: minmax, "),
        (weight, {"granularity": "per_row"}, "granularity=per_row is unknown; allowed: per_tensor"),
        (weight, {"granularity": "per_group"}, "granularity=per_group needs a group_size"),
        (weight, {"group_size": 8}, "group_size=8 has no effect with granularity=per_channel"),
    ],
)
def test_rules_that_would_do_nothing_or_something_else_are_refused(rule, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        rule(**changes)


def test_methods_refuse_such_settings_when_they_are_built() -> None:
    with pytest.raises(UserError, match="over=all cannot be combined with estimator=mse"):
        build(compose(["method=rtn", "method.act.estimator=mse"]).method)
    with pytest.raises(UserError, match="method.running=true .*method.act.over=first; allowed: all, ema"):
        build(compose(["method=qdiffusion", "method.running=true"]).method)


def test_ptq4dm_names_samplers_without_the_operation_before_anything_runs() -> None:
    built = build(compose(["method=ptq4dm"]).method)
    refused = [
        ("quantize_x", {"scheduler": "PNDMScheduler"}, "quantize_x=true is not defined for sampler.scheduler=PNDM"),
        ("quantize_mu", {"spacing": "quad"}, "quantize_mu=true .*spacing=quad; allowed: DDIMScheduler or DDPM"),
        ("quantize_sigma", {}, "quantize_sigma=true has no effect at sampler.eta=0"),
    ]
    for switch, changes, message in refused:
        sampler = ddim(**changes)
        scheduler = make_scheduler({"num_train_timesteps": 100}, sampler)
        built.check(sampler, scheduler)
        with pytest.raises(UserError, match=message):
            replace(built, **{switch: True}).check(sampler, scheduler)
    for switch, changes in [("sigma", {"eta": 1.0}), ("sigma", {"scheduler": "DDPMScheduler"}), ("x", {})]:
        sampler = ddim(**changes)
        scheduler = make_scheduler({"num_train_timesteps": 100}, sampler)
        replace(built, **{f"quantize_{switch}": True}).check(sampler, scheduler)


def test_rows_longer_than_one_piece_and_many_short_rows_agree_with_single_rows() -> None:
    generator = torch.Generator().manual_seed(8)
    long = torch.randn(2, 150_000, generator=generator)
    short = torch.randn(3000, 64, generator=generator)
    assert_same(choose_qparams(long, 4, estimator="mse"), ref.per_row(ref.mse_official, long, 4))
    scale, zero_point = choose_qparams(short, 4, estimator="mse")
    picked = torch.tensor([0, 2047, 2048, 2999])
    assert_same((scale[picked], zero_point[picked]), ref.per_row(ref.mse_official, short[picked], 4))


@pytest.mark.parametrize("side", [0, 1])
def test_ptq4dm_searches_by_the_metric_that_its_table_4_names(side: int) -> None:
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) ** 3
    x = x.abs() if side else x
    errors = {
        "ptq4dm": lambda q: (x - q).abs().pow(2.4).mean(dim=1),
        "ptq4dm_l1": lambda q: (x - q).abs().mean(dim=1),
        "ptq4dm_cosine": lambda q: 1 - torch.cosine_similarity(x, q, dim=1),
    }
    found = {name: ranges.ptq4dm_range(x, 4, estimator=name)[1] for name in errors}
    for name, error in errors.items():

        def score(limit: Tensor, error: Callable = error) -> Tensor:
            scale, zero_point = ranges.ptq4dm_qparams(limit * 0 if side else -limit, limit, 4)
            return error(fake_quantize(x, scale[:, None], zero_point[:, None], 0, 15))

        best = torch.stack([score(x.abs().amax(dim=1) * i / 100) for i in range(1, 101)]).amin(dim=0)
        torch.testing.assert_close(score(found[name]), best, rtol=1e-5, atol=1e-6)
        assert all((score(found[other]) >= best * (1 - 1e-5)).all() for other in errors)
    assert (found["ptq4dm_l1"] < found["ptq4dm"]).all(), "the smaller the exponent, the less outliers count"
