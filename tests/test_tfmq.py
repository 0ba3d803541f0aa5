"""TFMQ-DM: the traced temporal block is the network's, each part does what it promises, and off means off."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from dqbench.arguments import flatten
from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, build, compose
from dqbench.cost import cost, layers
from dqbench.errors import UserError
from dqbench.models import clone
from dqbench.quant import temporal
from dqbench.quant.attach import (
    find_units,
    freeze,
    installed,
    prepare,
    quantize_attention,
    quantize_inputs,
)
from dqbench.quant.checkpoint import load_denoiser, load_pipeline, save_denoiser, save_pipeline
from dqbench.quant.clock import clock_of, step_quantizers
from dqbench.quant.feature_cache import caches_of, make_cache
from dqbench.quant.functional import fake_quantize
from dqbench.quant.plan import select, split
from dqbench.quant.reconstruct import Job, reconstruct_weights
from dqbench.quant.running import RunningMinMax, calibrate_static
from dqbench.quant.shortcuts import skip_splits
from dqbench.quant.temporal import TemporalBlock, distinct_rows, reconstruct_block, trace_block
from dqbench.quant.temporal_error import choose_cached, error_table, mismatch, summed_error
from dqbench.sampling import generate
from dqbench.stages import resuming
from tests.tiny import ddim, pipeline

STEPS = [80, 60, 40, 20, 0]
W4A4 = Bits(4, 4, 4, 4)
UNET = ["time_embedding.*", "*.time_emb_proj"]
TINY = ["recon.iters=12", "recon.batch_size=8", "recon.lr=0.1", "method.weight_every=2"]
TINY += ["method.act.estimator=minmax", "method.weight.estimator=minmax"]
OFF = ["method.tiar.timesteps=none", "method.fsc.scope=none"]
FEATURES = "temporal features, squared error"


def calibration(count: int = 4) -> CalibrationSet:
    """`count` random rows of each step of the tiny sampler."""
    noise = torch.randn(5 * count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return replace(CalibrationSet.from_tensors(noise, torch.tensor(STEPS).repeat(count)), batch_size=16)


def method(name: str, *overrides: str):
    return build(compose([f"method={name}", *TINY, *overrides]).method)


@cache
def quantize(name: str, *overrides: str, act: int = 4):
    """A method's result on the tiny pipeline at 4-bit weights, made once for all tests."""
    return quantize_again(name, *overrides, act=act)


def quantize_again(name: str, *overrides: str, act: int = 4):
    return method(name, *overrides)(pipeline(), calibration(), Bits(4, act, act, act))


def errors(pipe) -> dict[str, float]:
    """Summed squared error of the temporal features, mean over timesteps, of each variant on the way."""
    return {name: float(np.mean(line)) for name, line in pipe.unet.diagnostics[FEATURES]["lines"].items()}


@pytest.fixture
def result():
    """TIAR and FSC on all activations."""
    return quantize("tfmq")


def class_conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=6,
    ).eval().requires_grad_(False)  # fmt: skip


def text_and_time() -> UNet2DConditionModel:
    """SDXL's way: pooled text and sizes come in a dict."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 5,
    ).eval().requires_grad_(False)  # fmt: skip


def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval().requires_grad_(False)  # fmt: skip


def families() -> dict[str, tuple]:
    """Family -> (model, arguments of 8 rows beside timestep, patterns, number of layers, of heads)."""
    sample, pooled = torch.randn(8, 1, 8, 8), torch.randn(8, 6)
    conditional = {"sample": sample, "encoder_hidden_states": torch.randn(8, 3, 8), "class_labels": pooled}
    added = {"added_cond_kwargs": {"text_embeds": torch.randn(8, 5), "time_ids": torch.arange(48.0).reshape(8, 6)}}
    described = {"sample": sample, "encoder_hidden_states": torch.randn(8, 3, 8), **added}
    adaptive = {"hidden_states": sample, "class_labels": torch.arange(8)}
    return {
        "unconditional": (pipeline().unet, {"sample": sample}, UNET, 10, 8),
        "pooled": (class_conditional(), conditional, [*UNET, "class_embedding"], 11, 8),
        "added": (text_and_time(), described, [*UNET, "add_embedding.*"], 12, 8),
        "dit": (transformer(), adaptive, ["*.norm1.emb.*", "*.norm1.linear", "proj_out_1"], 7, 3),
    }


@pytest.mark.parametrize("family", ["unconditional", "pooled", "added", "dit"])
def test_the_traced_block_is_the_networks_own(family):
    model, arguments, patterns, layer_count, head_count = families()[family]
    batch = {**arguments, "timestep": torch.arange(8) * 10}
    block = trace_block(model, batch, patterns)
    assert (len(block.layers), len(block.heads)) == (layer_count, head_count)
    conditions = {name for name in flatten(arguments) if name.startswith(("class_labels", "added_cond_kwargs."))}
    assert set(block.inputs) == {"timestep"} | conditions
    seen = {}
    for name in block.heads:
        model.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.setdefault(name, a[2]))
    model(**batch)
    rows = {name: torch.cat([values, values[:3]]) for name, values in flatten(batch).items() if name in block.inputs}
    for found, name in zip(block.features(model, rows), block.heads, strict=True):
        assert torch.equal(found[:8], seen[name]) and torch.equal(found[8:], seen[name][:3])
    weight = model.get_submodule(block.layers[0]).weight.requires_grad_(True)
    sum(head.square().sum() for head in block(model, flatten(batch))).backward()
    assert weight.grad.abs().sum() > 0


def test_patterns_that_cannot_be_a_temporal_block_are_named():
    batch = calibration().rows(np.arange(4))
    with pytest.raises(UserError, match="time_embedding: mid_block.resnets.0.conv1 depends on the sample"):
        trace_block(pipeline().unet, batch, [*UNET, "mid_block.resnets.0.conv1"])
    with pytest.raises(UserError, match="matches no layer"):
        trace_block(pipeline().unet, batch, ["nowhere.*"])


def test_there_is_one_row_for_whatever_the_block_can_tell_apart(caplog):
    labels = torch.tensor([0, 1, 0, 0, 1, 1])
    calib = CalibrationSet.from_tensors(
        torch.randn(6, 1, 8, 8), torch.tensor([40, 40, 40, 0, 0, 0]), class_labels=labels
    )
    block = TemporalBlock([], [], ["timestep"], [], torch.nn.Module(), 1)
    assert distinct_rows(block, calib, None, "cpu")["timestep"].tolist() == [40, 0]
    assert distinct_rows(block, calib, STEPS, "cpu")["timestep"].tolist() == STEPS
    block.inputs = ["timestep", "class_labels"]
    with caplog.at_level("INFO"):
        pairs = distinct_rows(block, calib, STEPS, "cpu")
    assert [tuple(pair) for pair in zip(*(values.tolist() for values in pairs.values()), strict=True)] == [
        (40, 0), (40, 1), (0, 0), (0, 1),
    ]  # fmt: skip
    assert "4 pairs of timestep and class_labels" in caplog.text


def test_tiar_lowers_the_embedding_error_of_nearest_rounding():
    pipe, calib, built = pipeline(), calibration(), method("tfmq", "recon.iters=150")
    student = clone(pipe).unet
    parts = prepare(student, select(student, W4A4, [], {}), built.weight, {})
    block = trace_block(pipe.unet, calib.rows(np.arange(5)), UNET)
    rows = distinct_rows(block, calib, STEPS, "cpu")
    exact, nearest = block.features(pipe.unet, rows), block.features(student, rows)
    others = {name: item.layer.weight.clone() for name, item in parts.items() if name not in block.layers}
    reconstruct_block(Job(student, pipe.unet, {}, parts, calib, built.recon, []), block, rows)
    assert summed_error(block.features(student, rows), exact) < 0.4 * summed_error(nearest, exact)
    assert all(torch.equal(parts[name].layer.weight, weight) for name, weight in others.items())
    for item in (parts[name] for name in block.layers):
        codes = item.layer.weight / item.grid.scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_block_reconstruction_leaves_the_temporal_block_alone(result):
    found, teacher = errors(result), pipeline().unet
    block = trace_block(teacher, calibration().rows(np.arange(5)), UNET)
    rows = {"timestep": torch.tensor(STEPS)}
    final = summed_error(block.features(result.unet, rows), block.features(teacher, rows))
    assert final == pytest.approx(found["reconstructed"], rel=1e-4) and final < found["nearest"]


def test_fsc_scopes(result):
    layers = {n for n, m in result.unet.named_modules() if hasattr(m, "act_quantizer")}
    assert {
        n.split(".act_quantizer")[0] for n, m in result.unet.named_modules() if m in step_quantizers(result.unet)
    } > layers
    some = quantize("tfmq", "method.fsc.scope=tib").unet
    assert len(step_quantizers(some)) == 10 and some.time_embedding.linear_1.act_quantizer.scale.shape == (5,)
    quantizer = some.time_embedding.linear_1.act_quantizer
    assert len(quantizer.scale.unique()) == 5, "every timestep embeds to a range of its own"
    assert installed(some, W4A4)[0]["time_embedding.linear_1"].act_groups == 5


def test_with_everything_off_it_is_its_base_bit_for_bit():
    pipe, calib = pipeline(), calibration()
    built, found = method("tfmq", *OFF), quantize("tfmq", *OFF)
    student = clone(pipe).unet
    splits = skip_splits(student, calib.rows([0]), ["up_blocks.*.conv_shortcut"])
    plan = split(select(student, W4A4, [], {}), list(splits))
    parts = prepare(student, plan, built.weight, splits)
    units = find_units(student, ["*.resnets.?", "*.attentions.?"], parts)
    assert any(name.startswith("time_embedding") for name in units)
    reconstruct_weights(Job(student, pipe.unet, units, parts, calib.where(calib.step % 2 == 0), built.recon, []))
    quantize_inputs(parts, signed=False)
    quantize_attention(student, W4A4, signed=False, signed_softmax=False)
    calibrate_static(student, calib, built.act, RunningMinMax)
    wanted, state = freeze(student).state_dict(), found.unet.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)
    assert clock_of(found.unet) is None


def test_cached_features_are_closer_than_maintained_ones_at_8_bits_and_selection_is_never_worse():
    for act in (8, 4):
        found = errors(quantize("tfmq_plus", act=act))
        assert found["DS"] <= min(found["CM"], found["TM"]) * (1 + 1e-6)
        assert act != 8 or found["CM"] < found["TM"]
    maintained, cached = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for granularity in ("ti", "i", "global"):
        chosen = choose_cached(maintained, cached, granularity)
        total = torch.where(chosen, cached, maintained).sum()
        assert total <= min(maintained.sum(), cached.sum()) and chosen.shape == (5, 3)
    assert (
        len(choose_cached(maintained, cached, "i").unique(dim=0))
        == len(choose_cached(maintained, cached, "global").unique())
        == 1
    )


def test_cached_layers_return_their_table_and_their_weights_are_gone():
    pipe, unet = pipeline(), quantize("tfmq_plus", "method.maintenance.kind=cm").unet
    block = trace_block(pipe.unet, calibration().rows(np.arange(5)), UNET)
    exact = block.features(pipe.unet, {"timestep": torch.tensor(STEPS)})
    layer, table = (
        unet.mid_block.resnets[0].time_emb_proj,
        exact[block.heads.index("mid_block.resnets.0.time_emb_proj")],
    )
    low, high = table.amin(1, keepdim=True).clamp(max=0), table.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    seen = []
    handle = layer.register_forward_hook(lambda *a: seen.append(a[2]))
    for timestep in (torch.tensor(40), torch.tensor([0, 80, 40])):
        unet(torch.randn(3, 1, 8, 8), timestep)
    handle.remove()
    wanted = fake_quantize(table, scale, torch.round(-low / scale), 0, 15)
    torch.testing.assert_close(torch.cat(seen), wanted[[2, 2, 2, 4, 0, 2]])
    assert set(caches_of(unet)) == set(block.heads) and type(layer) is torch.nn.Linear
    assert not any(parameter.any() for name in block.layers for parameter in unet.get_submodule(name).parameters())
    plan, bits = installed(unet, W4A4)
    bill = cost(layers(pipe.unet, {"sample": [1, 8, 8]}), plan, bits)
    kept = cost(layers(pipe.unet, {"sample": [1, 8, 8]}), *installed(quantize("tfmq", *OFF).unet, W4A4))
    assert all(plan[name].weight == 0 for name in block.layers) and bill.bops < kept.bops
    channels = sum(values.shape[1] for values in exact)
    stored = sum(plan[name].weight_overhead_bits for name in block.layers)
    assert stored == 5 * (4 * channels + len(block.heads) * (32 + 4))


def test_full_precision_caches_are_exact():
    table = torch.randn(5, 7)
    assert torch.equal(make_cache(table, 32).values(), table)


def test_caches_refuse_features_that_depend_on_more_than_time():
    pipe = pipeline()
    pipe.register_modules(unet=class_conditional())
    labels = {"encoder_hidden_states": torch.randn(20, 3, 8), "class_labels": torch.randn(20, 6)}
    plain = calibration()
    calib = CalibrationSet.from_tensors(*(torch.from_numpy(plain.inputs[k]) for k in ("sample", "timestep")), **labels)
    with pytest.raises(UserError, match="depend on class_labels too: use tm"):
        method("tfmq_plus")(pipe, calib, W4A4)


@pytest.mark.parametrize(
    "arguments", [["tfmq"], ["tfmq_official"], ["tfmq_plus"], ["tfmq_plus", "method.maintenance.kind=cm"]]
)
def test_saved_and_loaded_outputs_are_identical(arguments, tmp_path):
    found, pipe = quantize(*arguments), pipeline()
    (tmp_path / "denoiser").mkdir()
    save_denoiser(found, tmp_path / "denoiser")
    save_pipeline(found, tmp_path / "pipeline")
    images = generate(found, ddim(), [1, 2])
    for loaded in (load_denoiser(pipe, tmp_path / "denoiser"), load_pipeline(tmp_path / "pipeline")):
        assert np.array_equal(generate(loaded, ddim(), [1, 2]), images)
        assert installed(loaded.unet, W4A4) == installed(found.unet, W4A4)
        assert loaded.unet.diagnostics == json.loads(json.dumps(found.unet.diagnostics, allow_nan=False))


def test_a_killed_block_is_learned_again_and_a_finished_one_is_not(result, tmp_path, monkeypatch):
    loss, calls = temporal.reconstruction_loss, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 67:
            raise KeyboardInterrupt
        return loss(*args)

    with resuming(tmp_path):
        monkeypatch.setattr(temporal, "reconstruction_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize_again("tfmq")
        again = quantize_again("tfmq")
        count = len(calls)
        assert count == 67 + 12 * 8
        last = quantize_again("tfmq")
    assert len(calls) == count
    for other in (again, last):
        first, second = result.unet.state_dict(), other.unet.state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_sampler_or_set_that_does_not_fit_is_refused_in_one_line(result, tmp_path):
    with pytest.raises(UserError, match="another sampler"):
        generate(result, ddim(4), [1])
    calib = calibration()
    with resuming(tmp_path), pytest.raises(UserError, match="rows of 1 of the sampler's 5 steps .* calib=every_step"):
        method("tfmq")(pipeline(), calib.where(calib.step != 2), W4A4)
    for wrong in (
        "tiar.timesteps=some",
        "fsc.scope=few",
        "maintenance.kind=xm",
        "weight_every=0",
        "maintenance.cache_bits=9",
    ):
        with pytest.raises(UserError, match=wrong):
            method("tfmq", f"method.{wrong}")


def test_mismatch_is_the_shift_that_was_put_in():
    timestep = torch.tensor([0, 20, 40, 60, 80])
    exact = [torch.randn(5, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    shifted = [values[[1, 1, 2, 3, 4]] for values in exact]  # timestep 0 looks like 20: the step before it
    assert mismatch(timestep, exact, exact) == [0] * 5
    assert mismatch(timestep, shifted, exact) == [0, 0, 0, 0, -1]
    table = error_table(exact, [2 * values for values in exact], "cosine")
    assert table.abs().max() < 1e-6 and error_table(exact, exact, "mse").eq(0).all()


def test_a_cache_is_billed_where_the_layer_behind_it_stays_in_full_precision():
    head = "mid_block.resnets.0.time_emb_proj"
    unet = quantize("tfmq_plus", "method.maintenance.kind=cm", f"method.skip=[{head}]").unet
    cache = caches_of(unet)[head]
    assert unet.plan[head].weight_overhead_bits == cache.overhead_bits() > 0


def test_without_activation_quantizers_nothing_goes_by_steps():
    unet = quantize("tfmq", act=32).unet
    assert clock_of(unet) is None and not step_quantizers(unet)
