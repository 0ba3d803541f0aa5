"""GPTQ against elimination column by column, GPTAQ against least squares, AWQ's scales, and all three on a decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dqbench.config import Bits
from dqbench.errors import UserError
from dqbench.quant.awq import fold, foldable, search_scale
from dqbench.quant.calls import call_of, stages_of
from dqbench.quant.compensation import Curvature, Damping, RoundedBlock, compensate, round_columns, spans_of
from dqbench.quant.hessian import InputStatistics, rows_of
from dqbench.quant.quantizers import choose
from dqbench.quant.storage import stored_bits, unpack
from tests.test_quant_dllm import OFF, correlated, gauss, logits_error, method, text_calibration, text_pipeline
from tests.tiny import calibration, pipeline

NONE = Damping(0.01, 0.0)


def statistics_of(x: Tensor, reference: Tensor | None = None) -> InputStatistics:
    found = InputStatistics()
    found.add(x, reference)
    return found


def eliminated(weight: Tensor, hessian: Tensor, grid, group: int) -> Tensor:
    """OBQ with columns in order: after each one, the inverse of what is left of H, computed anew. In double."""
    weight, hessian, rounded = weight.double().clone(), hessian.double(), []
    for j in range(weight.shape[1]):
        if j % group == 0:
            scale, zero = (values.double() for values in grid(weight[:, j : j + group].float()))
        inverse = hessian[j:, j:].inverse()
        code = ((weight[:, j] / scale).round() + zero).clamp(0, 15)
        rounded.append((code - zero) * scale)
        weight[:, j:] -= torch.outer((weight[:, j] - rounded[-1]) / inverse[0, 0], inverse[0])
    return torch.stack(rounded, 1).float()


@pytest.mark.parametrize("group", [8, 5, 24])
def test_rounding_is_that_of_column_by_column_elimination(group):
    x, weight = correlated(300, 24), gauss(16, 24, seed=2)
    built = method("gptq", f"method.weight.group_size={group}")
    hessian = statistics_of(x).hessian()
    rounded, grid = built.round_matrix(weight, 4, Curvature.of(hessian.clone(), None, NONE), torch.arange(24))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    expected = eliminated(weight, damped, lambda block: choose(block, 4, built.weight), group)
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-5)
    own = torch.arange(24) // group
    whole = rounded / grid.scale[:, own] + grid.zero_point[:, own]
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)


def test_when_updates_happen_changes_nothing():
    x, reference, weight = correlated(300, 24), correlated(300, 24, seed=9), gauss(16, 24, seed=2)
    statistics = statistics_of(x, reference)
    curvature = Curvature.of(*statistics.take(), Damping(0.01, 0.25))

    def rounded(width: int) -> Tensor:
        def round_block(block: Tensor, span) -> RoundedBlock:
            return round_columns(block, curvature.within(span), lambda column, _: (column * 4).round() / 4)

        return compensate(weight, curvature, spans_of(24, width), round_block)

    assert torch.equal(rounded(24), rounded(7)) and torch.equal(rounded(24), rounded(1))


def test_drift_is_the_least_squares_answer_to_inputs_that_moved():
    reference, alpha = correlated(400, 10), 0.25
    x = reference + 0.2 * gauss(400, 10, seed=5)
    hessian, cross = statistics_of(x, reference).take()
    curvature = Curvature.of(hessian.clone(), cross, Damping(1e-6, alpha))
    moments = 2 * x.double().T @ x.double() / 400
    for j in range(9):  # what w_j (x_ref - x)_j asks of the later columns
        gap = 2 * (reference - x)[:, j].double() @ x[:, j + 1 :].double() / 400
        expected = alpha * torch.linalg.solve(moments[j + 1 :, j + 1 :], gap)
        torch.testing.assert_close(curvature.drift[j, j + 1 :].double(), expected, rtol=2e-3, atol=2e-4)
    assert torch.equal(curvature.drift, curvature.drift.triu(1))
    assert Curvature.of(hessian, cross, NONE).drift is None


@pytest.mark.parametrize("overrides", [[], ["method.act_order=true"], ["method.weight.estimator=mse"]])
def test_compensation_beats_nearest_and_is_stored_in_the_columns_order(overrides):
    x, weight = correlated(1000, 96), gauss(32, 96, seed=3)
    x = x * (1 + torch.arange(96).flip(0) % 7)
    built = method("gptq", "method.weight.group_size=32", *overrides)
    layer = nn.Linear(96, 32, bias=False)
    layer.weight.data = weight.clone()
    student = nn.ModuleDict({"a": layer})
    plan = {"a": Bits(3, **OFF)}
    built.solve(student, plan, ["a"], statistics_of(x), prefix="")
    nearest = method("awq", "method.weight.group_size=32", *overrides[:0]).nearest(weight, 3)[0]
    errors = [(x @ (rounded - weight).T).square().sum() for rounded in (layer.weight, nearest)]
    assert errors[0] < 0.75 * errors[1]
    storage = layer.weight_storage
    assert storage.header()["kind"] == "uniform" and stored_bits(storage) == 32 * 96 * 3 + 96 * (32 + 3)
    assert torch.equal(unpack(storage.pack(), storage.header()), layer.weight)
    assert all(len(row.unique()) <= 8 for row in layer.weight[:, :32])


def test_a_column_that_is_never_active_is_rounded_to_nearest():
    x, weight = correlated(100, 8), gauss(4, 8)
    x[:, 3] = 0
    built = method("gptq", "method.weight.granularity=per_channel", "method.weight.group_size=null")
    curvature = Curvature.of(statistics_of(x).hessian(), None, NONE)
    rounded, grid = built.round_matrix(weight, 4, curvature, torch.arange(8))
    assert ((rounded - weight)[:, 3].abs() <= grid.scale[:, 0] / 2 + 1e-6).all()


LAYERS = [
    (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    (nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False), (2, 3, 9, 8)),
    (nn.Conv2d(3, 4, (1, 3), dilation=(1, 2), bias=False), (2, 3, 9, 8)),
    (nn.Conv1d(3, 4, 3, padding=1, bias=False), (2, 3, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@torch.no_grad()
def test_rows_times_the_flat_weight_are_the_layer(layer, shape):
    x = gauss(*shape)
    output = layer(x)
    expected = output.flatten(0, -2) if isinstance(layer, nn.Linear) else output.flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(rows_of(layer, x) @ layer.weight.flatten(1).T, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_followed_are_named():
    with pytest.raises(UserError, match="grouped convolution.*method.skip"):
        rows_of(nn.Conv2d(4, 4, 3, groups=2), gauss(1, 4, 5, 5))
    two = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    two.forward = lambda x: two["used"](x)
    with pytest.raises(UserError, match="idle: not run"):
        stages_of(two, ["used", "idle"], ((gauss(2, 4),), {}))
    with pytest.raises(UserError, match="Linear is not run"):
        call_of(two, two["idle"], ((gauss(2, 4),), {}))
    with pytest.raises(UserError, match="damping.ridge=0"):
        Damping(0.0, 0.0)


def test_stages_share_a_tensor_and_the_way_it_is_read():
    net = nn.ModuleDict({"wide": nn.Conv2d(2, 3, 3, padding=1), "one": nn.Conv2d(2, 3, 1), "same": nn.Conv2d(2, 5, 1)})
    net.forward = lambda x: [net[name](x) for name in ("wide", "one", "same")]
    assert stages_of(net, list(net), ((gauss(1, 2, 4, 4),), {})) == [["wide"], ["one", "same"]]


def test_an_image_network_is_quantized_too_activations_included():
    pipe, built = pipeline(), method("gptq")
    unet = built(pipe, calibration(), Bits(3, 8, 8, 8)).unet
    assert {"conv_in", "mid_block.attentions.0.to_q", "time_embedding.linear_1", "conv_out"} <= set(unet.plan)
    assert all(layer.weight_storage is not None for layer in map(unet.get_submodule, unet.plan))
    assert hasattr(unet.conv_in, "act_quantizer")
    batch = calibration(64, seed=1).rows(np.arange(64))
    full = pipe.unet(**batch).sample
    nearest = method("rtn", "method.weight.granularity=per_group", "method.weight.group_size=128")
    ours, theirs = (one(pipe, calibration(), Bits(3, **OFF)).unet(**batch).sample for one in (built, nearest))
    assert (ours - full).square().mean() < 0.8 * (theirs - full).square().mean()


# AWQ


def test_scales_and_folds_leave_the_function_alone():
    for norm in (nn.RMSNorm(16), nn.LayerNorm(16)):
        nn.init.normal_(norm.weight)
        linear, x = nn.Linear(16, 8), gauss(4, 16)
        before = linear(norm(x)).detach()
        fold(norm, [linear], 2 ** gauss(16, seed=1))
        torch.testing.assert_close(linear(norm(x)).detach(), before, rtol=1e-5, atol=1e-5)
    first, second = nn.Linear(6, 16), nn.Linear(16, 3)
    before = second(first(gauss(4, 6))).detach()
    fold(first, [second], 2 ** gauss(16, seed=1))
    torch.testing.assert_close(second(first(gauss(4, 6))).detach(), before, rtol=1e-5, atol=1e-5)
    assert foldable(first, [second]) and not foldable(nn.Linear(6, 8), [second])


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_awq_without_rounding_is_the_full_precision_network(kv_heads, monkeypatch):
    pipe, built = text_pipeline(kv_heads=kv_heads), method("awq")
    for layer in pipe.model.model.layers:  # inputs of very different sizes
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = (1.5 * gauss(64)).exp()
    monkeypatch.setattr("dqbench.methods.awq.bake", lambda *args: None)
    result = built(pipe, text_calibration(), Bits(2, **OFF))
    assert logits_error(pipe, result) < 1e-10
    layers = result.model.model.layers[0], pipe.model.model.layers[0]
    moved = [
        not torch.equal(*(part.get_submodule(name).weight for part in layers)) for name, *_ in built.pairs.values()
    ]
    assert moved == [True, kv_heads == 4, True, True]


def test_the_search_prefers_what_lowers_the_output_error():
    x, weight, built = gauss(500, 64), gauss(32, 64, seed=1), method("awq", "method.weight.group_size=32")
    x[:, ::16] *= 30
    statistics = statistics_of(x)

    def error(scale: Tensor) -> float:
        change = built.nearest(weight * scale, 3)[0] / scale - weight
        return (x @ change.T).square().sum().item()

    found = search_scale([weight], statistics, lambda scaled: built.nearest(scaled, 3)[0], 20)
    assert error(found) < 0.6 * error(torch.ones(64))
    assert torch.equal(search_scale([weight], statistics, lambda w: built.nearest(w, 3)[0], 1), torch.ones(64))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_on_a_decoder_more_bits_are_closer_and_everything_is_stored(name):
    pipe, built, errors = text_pipeline(kv_heads=2), method(name, "method.weight.group_size=32"), []
    for n_bits in (2, 3, 4):
        result = built(pipe, text_calibration(), Bits(n_bits, **OFF))
        errors.append(logits_error(pipe, result))
        for layer in map(result.model.get_submodule, result.model.plan):
            assert torch.equal(unpack(layer.weight_storage.pack(), layer.weight_storage.header()), layer.weight)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and len(result.model.plan) == 14


def test_asymmetric_calibration_sees_the_full_precision_inputs():
    pipe = text_pipeline()
    plain, asymmetric = (
        method("gptq", f"method.damping.asymmetry={alpha}")(pipe, text_calibration(), Bits(2, **OFF)).model.model.layers
        for alpha in (0.0, 0.25)
    )
    first, last = (
        [torch.equal(*(part[i].get_submodule(name).weight for part in (plain, asymmetric))) for i in (0, 1)]
        for name in ("self_attn.q_proj", "self_attn.o_proj")
    )
    assert first == [True, False] and last == [False, False]  # nothing is quantized before the first stage
