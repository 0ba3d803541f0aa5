"""Every conf/method/*.yaml is composed, built and run on the tiny pipeline; then what each paper says in particular."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dqbench.config import Bits, build, compose, data_root
from dqbench.models import denoiser
from dqbench.quant.attach import installed
from dqbench.quant.attention import QuantAttnProcessor
from dqbench.quant.checkpoint import load_denoiser, load_pipeline, save_denoiser, save_pipeline
from dqbench.quant.plan import LAYER_TYPES, matches
from dqbench.quant.quantizers import act_quantizers
from dqbench.quant.storage import unpack
from dqbench.sampling import generate, set_sampler
from dqbench.schedulers import QuantizedDDIMScheduler
from tests.tiny import calibration, ddim, methods_for, pipeline

METHODS = sorted(path.stem for path in (data_root() / "conf" / "method").glob("*.yaml"))
QUANTIZED = methods_for("image")
TINY = ["recon.iters=4", "recon.iters_act=2", "recon.batch_size=4", "recon.act_init_samples=8"]


def method(name: str, *overrides: str):
    built = build(compose([f"method={name}", *TINY, *overrides]).method)
    return replace(built, chains=16) if hasattr(built, "chains") else built


def overrides_of(name: str) -> dict:
    built = method(name)
    return getattr(built, "base", built).overrides


def error(pipe, other) -> float:
    """Mean squared difference of the predicted noise on inputs outside of the calibration set."""
    batch = calibration(64, seed=1).rows(np.arange(64))
    with torch.no_grad():
        return (denoiser(pipe)(**batch).sample - denoiser(other)(**batch).sample).square().mean().item()


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request):
    """(method, full-precision pipeline, its untouched copy, quantized pipeline) at w4a8."""
    pipe = pipeline()
    untouched, built = copy.deepcopy(pipe), method(request.param)
    return built, pipe, untouched, built(pipe, calibration(), Bits(4, 8, 8, 8))


def test_the_given_pipeline_is_left_alone(quantized):
    _, pipe, untouched, _ = quantized
    before, after = untouched.unet.state_dict(), pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_weights_are_on_their_grid_and_layers_stay_plain(quantized):
    built, pipe, _, result = quantized
    plan, _ = installed(result.unet, Bits(4, 8, 8, 8))
    assert plan and set(pipe.unet.state_dict()) <= set(result.unet.state_dict())
    for name, layer in result.unet.named_modules():
        if isinstance(layer, LAYER_TYPES):
            assert type(layer) is type(pipe.unet.get_submodule(name)) and not hasattr(layer, "parametrizations")
        if name in plan and hasattr(layer, "weight_storage"):
            assert torch.equal(unpack(layer.weight_storage.pack(), layer.weight_storage.header()), layer.weight), name
        elif name in plan:
            groups = 2 if plan[name].weight_groups > layer.weight.shape[0] else 1
            distinct = max(len(row.unique()) for row in layer.weight.flatten(1))
            assert distinct <= groups * 2 ** plan[name].weight, name
    skip = getattr(built, "base", built).skip
    every = {name for name, module in pipe.unet.named_modules() if isinstance(module, LAYER_TYPES)}
    assert {name for name in every if not matches(name, skip)} <= set(plan)
    assert not any(plan[name].weight for name in plan if matches(name, skip))  # 0: a cache stands in for the layer


def test_result_is_frozen_close_and_seeded(quantized):
    _, pipe, _, result = quantized
    assert not result.unet.training and not any(p.requires_grad for p in result.unet.parameters())
    assert all(quantizer.observer is None and (quantizer.scale > 0).all() for quantizer in act_quantizers(result.unet))
    scale = denoiser(pipe)(**calibration(64, seed=1).rows(np.arange(64))).sample.square().mean().item()
    assert 0 < error(pipe, result) < 0.2 * scale
    images = generate(result, ddim(), [1, 2])
    np.testing.assert_allclose(generate(result, ddim(), [2]), images[1:], atol=2e-2)  # codes may flip on a tie
    assert np.isfinite(images).all()


def test_same_inputs_give_the_same_pipeline(quantized):
    built, pipe, _, result = quantized
    again = built(pipe, calibration(), Bits(4, 8, 8, 8))
    first, second = result.unet.state_dict(), again.unet.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_saved_and_loaded_outputs_are_identical(quantized, tmp_path):
    _, pipe, _, result = quantized
    batch = calibration(8, seed=2).rows(np.arange(8))
    images = generate(result, ddim(), [1, 2])
    (tmp_path / "denoiser").mkdir()
    save_denoiser(result, tmp_path / "denoiser")
    save_pipeline(result, tmp_path / "pipeline")
    for loaded in (load_denoiser(pipe, tmp_path / "denoiser"), load_pipeline(tmp_path / "pipeline")):
        assert torch.equal(loaded.unet(**batch).sample, result.unet(**batch).sample)
        assert np.array_equal(generate(loaded, ddim(), [1, 2]), images)
        assert installed(loaded.unet, Bits(4, 8, 8, 8)) == installed(result.unet, Bits(4, 8, 8, 8))


def test_fp32_is_the_pipeline_itself():
    pipe = pipeline()
    assert method("fp32")(pipe, calibration(), Bits(4, 8, 8, 8)) is pipe


@pytest.mark.parametrize("name", ["rtn", "qdiffusion", "ptq4dm"])
def test_more_bits_are_closer(name):
    pipe, built = pipeline(), method(name)
    errors = [error(pipe, built(pipe, calibration(), Bits(bits, bits, bits, 8))) for bits in (3, 5, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("name", QUANTIZED)
def test_bits_that_are_off_change_nothing(name):
    pipe = pipeline()
    result = method(name)(pipe, calibration(), Bits(32, 32, 32, 32))
    own = {"weight", "act"} & {key for layer in overrides_of(name).values() for key in layer}
    assert "weight" in own or error(pipe, result) == 0
    assert "act" in own or not act_quantizers(result.unet)


@pytest.mark.parametrize("name", ["rtn", "qdiffusion"])
def test_skip_and_overrides(name):
    pipe = pipeline()
    built = method(name)
    built.skip, built.overrides = ["conv_in"], {"conv_out": {"weight": 8, "act": 32}}
    unet = built(pipe, calibration(), Bits(4, 8, 32, 32)).unet
    assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight) and not hasattr(unet.conv_in, "act_quantizer")
    assert not hasattr(unet.conv_out, "act_quantizer") and hasattr(unet.mid_block.resnets[0].conv1, "act_quantizer")


def test_qdiffusion_splits_shortcuts_and_only_them():
    pipe = pipeline()
    unet = method("qdiffusion")(pipe, calibration(), Bits(4, 8, 8, 8)).unet
    split = {name for name, module in unet.named_modules() if type(module).__name__ == "SplitQuantizer"}
    assert split == {f"up_blocks.{i}.resnets.{j}.conv_shortcut.act_quantizer" for i in (0, 1) for j in (0, 1)}
    whole = method("qdiffusion", "method.split=false")(pipe, calibration(), Bits(4, 8, 8, 8)).unet
    assert not [m for m in whole.modules() if type(m).__name__ == "SplitQuantizer"]


def test_qdiffusion_official_quantizes_symmetrically_and_softmax_signed():
    unet = method("qdiffusion_official")(pipeline(), calibration(), Bits(4, 8, 8, 8)).unet
    assert all(quantizer.signed and quantizer.zero_point == 0 for quantizer in act_quantizers(unet))
    softmax = unet.mid_block.attentions[0].processor.quantizers["softmax"]
    assert softmax.scale * 127 <= 1 + 1e-6  # 127 positive levels


def test_qdiffusion_running_statistics_follow_the_set():
    pipe, bits = pipeline(), Bits(32, 8, 32, 32)
    follow = ["recon.iters_act=0", "method.running=true", "method.act.over=ema", "method.act.momentum=0.5"]
    first = method("qdiffusion", "recon.iters_act=0")(pipe, calibration(), bits).unet
    running = method("qdiffusion", *follow)(pipe, calibration(), bits).unet
    pairs = zip(act_quantizers(first), act_quantizers(running), strict=True)
    assert any(a.scale != b.scale for a, b in pairs)


def test_ptq4dm_official_sits_on_outputs_and_leaves_attention_alone():
    unet = method("ptq4dm_official")(pipeline(), calibration(), Bits(8, 8, 8, 8)).unet
    assert unet.conv_in.act_site == "output" and not hasattr(unet.conv_out, "act_quantizer")
    assert not [attn for attn in unet.modules() if isinstance(getattr(attn, "processor", None), QuantAttnProcessor)]
    seen = []
    unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(output))
    unet(**calibration(seed=1).rows(np.arange(8)))
    assert len(seen[0].unique()) <= 256


def test_ptq4dm_zero_points_are_fixed_unless_official():
    sane = method("ptq4dm")(pipeline(), calibration(), Bits(8, 8, 32, 32)).unet
    assert {int(quantizer.zero_point) for quantizer in act_quantizers(sane)} <= {0, 128, 255}


def test_ptq4dm_operation_selection_reaches_the_scheduler_and_the_disk(tmp_path):
    pipe = set_sampler(pipeline(), ddim())
    result = method("ptq4dm", "method.quantize_x=true", "method.quantize_mu=true")(
        pipe, calibration(), Bits(8, 8, 8, 8)
    )
    assert isinstance(result.scheduler, QuantizedDDIMScheduler) and result.scheduler.config.operations == ["mu", "x"]
    save_denoiser(result, tmp_path)
    loaded = load_denoiser(pipe, tmp_path)
    assert np.array_equal(generate(loaded, ddim(), [5]), generate(result, ddim(), [5]))
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_yaml_headers_say_what_they_are():
    for name in METHODS:
        text = Path(data_root(), "conf", "method", f"{name}.yaml").read_text()
        assert text.startswith("# ") and OmegaConf.create(text).name == name
