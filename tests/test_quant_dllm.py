"""Quant-dLLM: binary planes, shared-out bits, importance, compensation, masking, and decoder layers one at a time."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, Model, build, compose
from dqbench.errors import UserError
from dqbench.identity import plain
from dqbench.models import attach_anatomy
from dqbench.quant import packing
from dqbench.quant.block_bits import allocate
from dqbench.quant.calls import LayerInputs, first_inputs, stages_of
from dqbench.quant.compensation import Curvature, Damping, RoundedBlock, block_error, compensate
from dqbench.quant.hessian import InputStatistics, inverse_factor
from dqbench.quant.multi_binary import Refinement, Solver, approximate, overhead_bits, store, widths_of
from dqbench.quant.sequential import (
    DecoderInputs,
    OnDisk,
    quantize_checkpoint,
    quantize_decoder_layer,
    quantize_layers,
)
from dqbench.quant.storage import stored_bits, unpack
from dqbench.text.mcs import mask_rows
from dqbench.text.networks import BidirectionalLlama
from tests.tiny import calibration, pipeline

RULE = Refinement(iterations=15, eps=1e-8, single="resolved")
VOCAB, LENGTH = 50, 24
OFF = {"act": 32, "attention": 32, "softmax": 32}


class TextPipeline(DiffusionPipeline):
    def __init__(self, model: nn.Module, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)


def text_pipeline(layers: int = 2, kv_heads: int = 4) -> TextPipeline:
    """A random bidirectional Llama: hidden 64, intermediate 96."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    pipe = TextPipeline(BidirectionalLlama(config).eval().requires_grad_(False), DDPMScheduler())
    blank = dict.fromkeys(("data", "prompts", "num_classes")) | {"architecture": {}, "inputs": {}}
    blank |= {key: [] for key in ("official_order", "shortcuts", "time_embedding")}
    model = {"name": "tiny_text", "path": "", "version": 1, "pipeline": "", "denoiser": "model", "dtype": "float32"}
    attach_anatomy(pipe, Model(**model, **blank, units=["model.layers.?*"]))
    return pipe


def text_calibration(rows: int = 32, seed: int = 0) -> CalibrationSet:
    ids = np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH))
    return CalibrationSet({"input_ids": ids}, np.zeros(rows, dtype=int), batch_size=8)


def method(name: str, *overrides: str):
    return build(compose([f"method={name}", *overrides]).method)


def logits_error(pipe, other) -> float:
    """Relative squared error of the logits on rows outside of the calibration set."""
    batch = text_calibration(16, seed=7).rows(np.arange(16))
    full = pipe.model(**batch).logits
    return ((other.model(**batch).logits - full).square().sum() / full.square().sum()).item()


def gauss(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    return gauss(rows, columns, seed=seed) @ gauss(columns, columns, seed=seed + 1) / columns**0.5


def relative_error(weight: Tensor, order: int) -> float:
    rounded = approximate(weight.unsqueeze(0), order, None, RULE).dequantize()[0]
    return ((rounded - weight).square().sum() / weight.square().sum()).item()


# DAQ


ANCHORS = [(1, 0.360, 0.496, 0.354), (2, 0.114, 0.166, 0.106), (3, 0.0345, 0.050, 0.031)]


@pytest.mark.parametrize(("order", "normal", "laplace", "scaled"), ANCHORS)
def test_relative_errors_are_those_of_the_method(order, normal, laplace, scaled):
    weight, uniform = gauss(1024, 128), torch.rand(1024, 128, generator=torch.Generator().manual_seed(1)) - 0.5
    heavy = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()
    both = weight * (0.5 * gauss(1024, 1, seed=2)).exp() * (0.5 * gauss(1, 128, seed=3)).exp()
    assert relative_error(weight, order) == pytest.approx(normal, rel=0.01)
    assert relative_error(heavy, order) == pytest.approx(laplace, rel=0.02)
    assert relative_error(both, order) == pytest.approx(scaled, rel=0.05)


def plain_daq(weight: Tensor, order: int, emphasis: Tensor, iterations: int, eps: float) -> Tensor:
    """W^ in fp precision, from the equations: one [n, w] block, every combination of signs tried."""
    rows, columns, signs, rest = [], [], [], weight.clone()
    for _ in range(order):
        rows.append(rest.abs().mean(1))
        columns.append((rest.abs() / rows[-1][:, None]).mean(0))
        signs.append(torch.where(rest < 0, -1.0, 1.0).to(weight))
        rest = rest - rows[-1][:, None] * columns[-1] * signs[-1]
    combinations = torch.tensor(list(product((1.0, -1.0), repeat=order))).to(weight)
    for _ in range(iterations):
        for k in range(order):
            target = weight - sum(rows[j][:, None] * columns[j] * signs[j] for j in range(order) if j != k)
            rows[k] = (emphasis * target * signs[k]) @ columns[k] / (emphasis @ columns[k] ** 2 + eps)
            columns[k] = (emphasis * target * signs[k]).T @ rows[k] / (emphasis.T @ rows[k] ** 2 + eps)
        products = torch.stack([rows[k][:, None] * columns[k] for k in range(order)])
        sums = torch.einsum("sk,knw->snw", combinations, products)
        signs = list(combinations[(sums - weight).abs().argmin(0)].permute(2, 0, 1))
    return sum(rows[k][:, None] * columns[k] * signs[k] for k in range(order))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_alternation_is_that_of_the_equations(order):
    weight = gauss(24, 16, dtype=torch.float64)
    emphasis = torch.where(gauss(24, 16, seed=1) > 1, 3.0, 1.0).double()
    solver = Solver(weight[None], order, emphasis[None], 1e-8)
    for _ in range(4):
        for k in range(order):
            solver.update_scales(k)
        solver.update_signs()
    expected = plain_daq(weight, order, emphasis, 4, 1e-8)
    torch.testing.assert_close(sum(solver.plane(k) for k in range(order))[0], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solver.residual[0], weight - expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 10**6))
def test_objective_never_rises(order, rows, columns, weighted, seed):
    weight = gauss(2, rows, columns, seed=seed, dtype=torch.float64) ** 3
    emphasis = gauss(2, rows, columns, seed=seed + 1, dtype=torch.float64).exp() if weighted else None
    solver = Solver(weight, order, emphasis, 1e-15)  # 1e-8 is not small beside blocks of one element
    before = solver.objective()
    for step in (*(partial(solver.update_scales, k) for k in range(order)), solver.update_signs) * 5:
        step()
        after = solver.objective()
        assert (after <= before + 1e-9 * weight.square().sum((1, 2))).all()
        before = after
    signed = torch.tensor(list(product((1.0, -1.0), repeat=order)), dtype=torch.float64)
    planes = torch.stack([r[..., None] * c[..., None, :] for r, c in zip(solver.rows, solver.columns, strict=True)])
    nearest = (torch.einsum("sk,kgnw->sgnw", signed, planes) - weight).abs().amin(0)
    solver.update_signs()
    torch.testing.assert_close(solver.residual.abs(), nearest, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_rounding_the_scales_costs_next_to_nothing(order):
    weight = gauss(1, 256, 128)
    solver = Solver(weight, order, None, 1e-8)
    for _ in range(15):
        for k in range(order):
            solver.update_scales(k)
        solver.update_signs()
    before = solver.objective().item()
    solver.round_scales(weight, torch.ones(1, 1))
    assert solver.objective().item() < before * (1 + 1e-5)


def test_error_does_not_depend_on_the_unit_of_the_weights():
    weight = gauss(128, 64)
    assert all(
        relative_error(weight * unit, 2) == pytest.approx(relative_error(weight, 2), rel=1e-3) for unit in (1e-6, 1e4)
    )


def test_emphasis_of_one_is_none_and_more_protects_what_it_marks():
    weight, marked = gauss(1, 128, 64), gauss(1, 128, 64, seed=1) > 1.5
    ones, none = (approximate(weight, 2, emphasis, RULE) for emphasis in (torch.ones_like(weight), None))
    torch.testing.assert_close(ones.dequantize(), none.dequantize(), rtol=1e-3, atol=1e-4)
    more = approximate(weight, 2, torch.where(marked, 10.0, 1.0), RULE).dequantize()
    error, plain_error = ((planes - weight).square()[marked].mean() for planes in (more, none.dequantize()))
    assert error < 0.8 * plain_error


def test_blocks_of_a_batch_do_not_see_each_other_and_a_plane_alone_has_the_signs_of_the_weight():
    blocks = gauss(5, 40, 24)
    together = approximate(blocks, 2, None, RULE)
    for block, planes in zip(blocks, together, strict=True):
        torch.testing.assert_close(planes.dequantize()[0], approximate(block[None], 2, None, RULE).dequantize()[0])
    for single in ("resolved", "fixed"):
        assert torch.equal(approximate(blocks, 1, None, replace(RULE, single=single)).signs[:, 0], blocks >= 0)


def test_rows_and_columns_of_zeros():
    weight = gauss(8, 6)
    weight[2], weight[:, 3] = 0, 0
    rounded = approximate(weight[None], 2, None, RULE).dequantize()[0]
    assert (rounded[2] == 0).all() and rounded.isfinite().all() and rounded[:, 3].abs().max() < 1e-6
    assert (approximate(torch.zeros(1, 4, 4), 3, None, RULE).dequantize() == 0).all()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_storage_round_trip_is_bit_exact(orders, rows, width, seed):
    widths = [width] * (len(orders) - 1) + [1 + seed % width]
    planes = [
        approximate(gauss(1, rows, own, seed=seed + g), order, None, replace(RULE, iterations=2))
        for g, (order, own) in enumerate(zip(orders, widths, strict=True))
    ]
    weight = torch.cat([block.dequantize()[0] for block in planes], dim=1)
    storage = store(planes, weight)
    assert torch.equal(unpack(storage.pack(), storage.header()), weight)
    bits = torch.cat([block.signs.flatten() for block in planes])
    assert torch.equal(storage.pack()["signs"], packing.pack(bits, 1))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_stored_bytes_are_those_of_the_formula(order):
    n, m, block = 512, 1024, 128
    planes = list(approximate(gauss(m // block, n, block), order, None, replace(RULE, iterations=1)))
    storage = store(planes, torch.empty(n, m))
    assert stored_bits(storage) / (n * m) == pytest.approx(order * (1 + 16 / block + 16 / n), rel=0.01)
    assert stored_bits(storage) == order * n * m + overhead_bits(n, widths_of(m, block), order)


def test_damaged_storage_is_refused():
    storage = store(list(approximate(gauss(1, 8, 8), 2, None, RULE)), torch.empty(8, 8))
    tensors = {**storage.pack(), "signs": storage.pack()["signs"] ^ 1}
    with pytest.raises(UserError, match="altered"):
        unpack(tensors, storage.header())


# ABMP, importance, compensation


def test_mean_order_is_exact_for_every_number_of_blocks():
    for blocks, ratio, order, edge in product(range(1, 60), (0.0, 0.05, 0.1, 0.29, 0.5), (2, 4), (0, 37)):
        widths = [128] * blocks + [edge] * bool(edge)
        orders = allocate(np.random.default_rng(blocks).random(len(widths)), widths, order, ratio)
        assert sum(own * width for own, width in zip(orders, widths, strict=True)) == order * sum(widths)
    known = {(4096, 0.05): 1, (12288, 0.05): 4, (3584, 0.1): 2, (18944, 0.1): 14, (12800, 0.29): 29, (384, 0.05): 0}
    for (columns, ratio), moved in known.items():
        orders = allocate(range(columns // 128), widths_of(columns, 128), 2, ratio)
        assert orders == [1] * moved + [2] * (columns // 128 - 2 * moved) + [3] * moved
    with pytest.raises(UserError, match="0 to 0.5"):
        allocate([1, 2], [8, 8], 2, 0.6)


def test_factor_is_that_of_the_damped_inverse():
    x = correlated(200, 12)
    x[:, 4] = 0
    statistics = InputStatistics()
    for part in x.split(70):
        statistics.add(part)
    hessian = 2 * x.double().T @ x.double() / 200
    expected = hessian + torch.diag(0.1 * hessian.diagonal().mean() + (hessian.diagonal() == 0).double())
    factor = inverse_factor(statistics.hessian(), 0.1).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, expected.inverse(), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="damping=0.0"):
        inverse_factor(-torch.eye(3), 0.0)


def test_exact_compensation_is_the_least_squares_answer_and_diagonal_the_releases():
    x, weight, width = correlated(400, 12), gauss(5, 12, seed=3), 4
    hessian, damping = 2 * x.T @ x / 400, Damping(0.01, 0.0)
    curvature = Curvature.of(hessian.clone(), None, damping)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    moved: dict[str, list[Tensor]] = {"exact": [], "diagonal": []}
    for kind, seen in moved.items():

        def round_block(block: Tensor, span, kind=kind, seen=seen) -> RoundedBlock:
            seen.append(block.clone())
            factor = curvature.within(span).factor
            return RoundedBlock(block.round(), block_error(block.clone(), block.round(), factor, kind), block.clone())

        compensate(weight, curvature, [(0, 4), (4, 8), (8, 12)], round_block)
    change = weight[:, :width] - weight[:, :width].round()
    rest = torch.linalg.solve(damped[width:, width:], damped[width:, :width] @ change.T).T
    torch.testing.assert_close(moved["exact"][1], (weight[:, width:] + rest)[:, :4], rtol=1e-3, atol=1e-4)
    released = (change / curvature.factor.diagonal()[:width]) @ curvature.factor[:width, width:]
    torch.testing.assert_close(moved["diagonal"][1], (weight[:, width:] - released)[:, :4], rtol=1e-4, atol=1e-5)


def test_outliers_by_both_rules():
    importance = gauss(3, 40, 30).abs() ** 3
    paper, release = (method(name).outliers.weights(importance) for name in ("quant_dllm", "quant_dllm_official"))
    for block, ours, theirs in zip(importance.numpy(), paper, release, strict=True):
        z = (block - block.mean()) / block.std(ddof=1)
        assert np.array_equal(ours.numpy(), np.where(np.abs(z) > 3, 3, 1))
        assert np.array_equal(theirs.numpy(), np.where(block >= block[np.abs(z) > 2].min(), 3, 1))
    assert (method("quant_dllm_official").outliers.weights(torch.ones(1, 4, 4)) == 1).all()
    assert method("quant_dllm", "method.outliers.emphasis=1").outliers.weights(importance) is None


def test_compensation_and_refinement_lower_the_output_error():
    x, weight = correlated(2000, 256), gauss(128, 256, seed=5)
    statistics = InputStatistics()
    statistics.add(x)
    curvature = Curvature.of(statistics.hessian(), None, Damping(0.01, 0.0))

    def error(*overrides: str) -> float:
        built = method("quant_dllm", "method.block_size=32", *overrides)
        planes = built.approximate(weight, 2, curvature)
        return (x @ (torch.cat([block.dequantize()[0] for block in planes], 1) - weight).T).square().mean().item()

    base, greedy = error(), error("method.daq.iterations=0")
    assert base < 0.9 * greedy
    assert error("method.compensation=exact") < error("method.compensation=diagonal") < base


def test_planes_go_from_the_least_to_the_most_important_block():
    x, weight = correlated(500, 64), 0.1 * gauss(16, 64, seed=2)
    weight[:, 16:32] *= 10
    weight[:, 48:] /= 10
    statistics = InputStatistics()
    statistics.add(x)
    curvature = Curvature.of(statistics.hessian(), None, Damping(0.01, 0.0))
    for kind in ("none", "diagonal"):
        built = method("quant_dllm", "method.block_size=16", "method.abmp=0.25", f"method.compensation={kind}")
        assert [planes.signs.shape[1] for planes in built.approximate(weight, 2, curvature)] == [2, 3, 2, 1]


def test_presets_differ_in_the_switches_of_the_release():
    paper, release = (plain(compose([f"method={name}"]).method) for name in ("quant_dllm", "quant_dllm_official"))
    assert {key for key in paper if paper[key] != release[key]} == {"name", "daq", "outliers", "compensation"}
    assert (paper["compensation"], release["compensation"]) == ("none", "diagonal")
    assert (paper["daq"]["single"], release["daq"]["single"]) == ("resolved", "fixed")


# The method on a decoder


@pytest.mark.parametrize("name", ["quant_dllm", "quant_dllm_official"])
def test_weights_are_what_is_stored_and_billed(name):
    pipe = text_pipeline()
    built, bits = method(name, "method.block_size=16", "method.abmp=0.25"), Bits(2, **OFF)
    result = built(pipe, text_calibration(), bits).model
    assert result.plan == built.plan(pipe.model.to("meta"), bits) and len(result.plan) == 14
    for layer, own in result.plan.items():
        module = result.get_submodule(layer)
        storage = module.weight_storage
        assert torch.equal(unpack(storage.pack(), storage.header()), module.weight)
        assert set(storage.pack()["orders"].tolist()) == {1, 2, 3} and storage.pack()["rows"].dtype == torch.float16
        assert stored_bits(storage) == own.weight * module.weight.numel() + own.weight_overhead_bits
    assert not hasattr(result.lm_head, "weight_storage")


def test_more_planes_are_closer_and_the_given_network_is_left_alone():
    pipe, built = text_pipeline(), method("quant_dllm")
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    errors = [logits_error(pipe, built(pipe, text_calibration(), Bits(n, **OFF))) for n in (2, 3, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert all(torch.equal(before[name], value) for name, value in pipe.model.state_dict().items())


@pytest.mark.parametrize("name", ["quant_dllm", "awq"])
def test_what_the_methods_cannot_do_is_one_line(name):
    with pytest.raises(UserError, match=f"method={name} needs a language model, which UnconditionalPipeline is not"):
        method(name)(pipeline(), calibration(), Bits(2, **OFF))
    with pytest.raises(UserError, match="bits.act=8.*weights alone.*w2a32"):
        method(name)(text_pipeline(), text_calibration(), Bits(2, 8, 8, 8))
    with pytest.raises(UserError, match="lm_head.*method.skip"):
        method(name, "method.skip=[]")(text_pipeline(), text_calibration(), Bits(2, **OFF))


def test_stages_of_a_decoder_layer_see_the_stages_before_them_quantized():
    pipe = text_pipeline()
    layer, inputs = pipe.model.model.layers[0], first_inputs(pipe.model, "model.layers.0", text_calibration().batches())
    names, seen = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)], {}
    expected = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    found = stages_of(layer, names, next(iter(inputs)))
    assert [[name.rpartition(".")[2] for name in stage] for stage in found] == expected

    def halve(stage: list[str], statistics: InputStatistics) -> None:
        seen[stage[0]] = statistics.hessian()
        for name in stage:
            layer.get_submodule(name).weight.data *= 0.5

    gate, up = layer.mlp.gate_proj.weight.clone(), layer.mlp.up_proj.weight.clone()
    start = list(inputs.hidden)
    quantize_decoder_layer(layer, names, DecoderInputs(inputs, None), halve)
    grabbed: list[Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: grabbed.append(args[0]))
    for x, (args, kwargs) in zip(start, inputs.others, strict=True):
        layer(x, *args, **kwargs)
    handle.remove()
    x = torch.cat(grabbed).flatten(0, 1)  # halving down_proj, the last, does not reach it
    hidden = nn.functional.silu(x @ gate.T / 2) * (x @ up.T / 2)
    torch.testing.assert_close(seen["mlp.down_proj"], 2 * hidden.T @ hidden / len(x), rtol=1e-4, atol=1e-6)


def test_the_next_layer_gets_what_the_quantized_one_makes_and_the_teacher_what_the_original_makes():
    pipe = text_pipeline()
    layer, student = (
        pipe.model.model.layers[0],
        first_inputs(pipe.model, "model.layers.0", text_calibration().batches()),
    )
    start, original = next(iter(student)), copy.deepcopy(layer)
    inputs = DecoderInputs(student, LayerInputs(list(student.hidden), student.others))

    def halve(stage: list[str], _: InputStatistics) -> None:
        for name in stage:
            layer.get_submodule(name).weight.data *= 0.5

    quantize_decoder_layer(layer, ["self_attn.v_proj", "mlp.up_proj"], inputs, halve)
    for found, expected in ((inputs.student, layer), (inputs.teacher, original)):
        assert torch.equal(found.hidden[0], expected(*start[0], **start[1]))
    assert not torch.equal(inputs.student.hidden[0], inputs.teacher.hidden[0])


def test_decoder_layers_can_come_from_a_checkpoint_one_at_a_time():
    pipe, calib, bits = text_pipeline(layers=3), text_calibration(), Bits(2, **OFF)
    built = method("quant_dllm_official", "method.block_size=16")
    expected = built(pipe, calib, bits).model
    stored = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    network, kept = pipe.model, {}
    plan = built.plan(network, bits)
    for module in (network.model.layers, network.model.embed_tokens, network.model.norm, network.lm_head):
        module.to("meta")
    resident: list[set[str]] = []

    def read(module: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}

    def sink(name: str, layer: nn.Module) -> None:
        kept[name] = {key: value.clone() for key, value in layer.state_dict().items()}
        resident.append({key.split(".")[2] for key, value in network.named_parameters() if not value.is_meta})

    names = [f"model.layers.{i}" for i in range(3)]
    table = stored["model.embed_tokens.weight"]
    disk = OnDisk(network, names, read, lambda ids: table[ids])
    quantize_checkpoint(disk, calib.batches(), partial(built.quantize_layer, plan=plan), sink, built.compares)
    assert resident == [{"0"}, {"1"}, {"2"}] and all(value.is_meta for value in network.parameters())
    assert plan == expected.plan and not any(hasattr(module, "weight_storage") for module in network.modules())
    for name, state in kept.items():
        reference = expected.get_submodule(name).state_dict()
        assert all(torch.equal(value, reference[key]) for key, value in state.items())


def test_the_driver_hands_each_layer_on_before_it_takes_the_next():
    order: list[str] = []

    def layers():
        for name in "ab":
            order.append(f"read {name}")
            yield name, nn.Identity()

    inputs = DecoderInputs(LayerInputs([], []), None)
    quantize_layers(
        layers(), inputs, lambda name, *_: order.append(f"do {name}"), lambda name, _: order.append(f"put {name}")
    )
    assert order == ["read a", "do a", "put a", "read b", "do b", "put b"]


# MCS


def test_masks_leave_the_prefix_and_follow_the_time():
    ids = torch.arange(64).repeat(40, 1)
    masked = mask_rows(ids, "per_sample_grid", 0.25, 20, 99, 0)
    assert torch.equal(masked.ids[:, :16], ids[:, :16]) and (masked.ids[-1, 16:] == 99).all()
    assert torch.allclose(masked.ratio, torch.arange(1, 41) / 40)
    hidden = masked.ids == 99
    assert torch.equal(masked.ids[~hidden], ids[~hidden])
    assert (hidden[:, 16:].float().mean(1) - masked.ratio).abs().max() < 0.25
    assert (hidden[:, 16:].float().mean(1) - masked.ratio).mean().abs() < 0.03


def test_masks_depend_on_the_seed_and_their_row_alone():
    ids = torch.arange(64).repeat(6, 1)
    first, again, other = (mask_rows(ids, "cross", 0.0, 5, 99, seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == 30
    assert torch.equal(first[:10], mask_rows(ids[:2], "cross", 0.0, 5, 99, 0).ids)
    assert torch.allclose(
        mask_rows(ids, "cross", 0.0, 5, 99, 0).ratio, torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]).repeat(6)
    )
    assert len({tuple(row.tolist()) for row in first}) == 25  # a row's last time masks all of it
    untouched = mask_rows(ids, "none", 0.25, 1, 99, 0)
    assert torch.equal(untouched.ids, ids) and (untouched.ratio == 0).all()
    with pytest.raises(UserError, match="mcs.mode=grid"):
        mask_rows(ids, "grid", 0.25, 1, 99, 0)
