"""What conditions a sample, and where checkpoints come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf

from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.launching.preflight import check_call
from dqbench.models import (
    UnconditionalPipeline,
    anatomy,
    architecture,
    clone,
    conditions,
    default_units,
    denoiser,
    input_shapes,
    load,
    resolve,
)
from dqbench.quant.attach import find_units
from dqbench.quant.plan import LAYER_TYPES
from tests.tiny import ddim, pipeline


def test_conditions_follow_the_sample_index(tmp_path):
    family = anatomy(pipeline())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    assert conditions(family, [0, 1]) == {}
    assert conditions(replace(family, num_classes=10), [9, 10]) == {"class_labels": [9, 0]}
    assert conditions(replace(family, prompts=str(prompts)), [3, 0]) == {"prompt": ["a dog", "a cat"]}
    for text in ("", None):
        prompts.write_text(text) if text is not None else prompts.unlink()
        with pytest.raises(UserError, match="one prompt per line"):
            conditions(replace(family, prompts=str(prompts)), [0])


def test_a_clone_shares_nothing_that_a_method_changes():
    pipe = pipeline()
    twin = clone(pipe)
    twin.unet.conv_in.weight.data.zero_()
    twin.scheduler.set_timesteps(3)
    assert pipe.unet.conv_in.weight.abs().sum() > 0 and len(pipe.scheduler.timesteps) != 3
    assert anatomy(twin) == anatomy(pipe)


def test_own_folders_load_by_their_patterns(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    family = replace(anatomy(pipe), path=str(tmp_path), pipeline="dqbench.models.UnconditionalPipeline")
    loaded = load(family)
    assert not denoiser(loaded).training and not any(p.requires_grad for p in denoiser(loaded).parameters())
    with pytest.raises(UserError, match="shipped: digits_ddpm"):
        resolve(replace(family, path="zoo:nothing"))


def test_settings_that_a_pipeline_would_drop_are_refused():
    family = replace(anatomy(pipeline()), pipeline="dqbench.models.UnconditionalPipeline")
    check_call(family, ddim(eta=0.5))
    for model, sampler in ((family, ddim(guidance=7.5)), (replace(family, num_classes=10), ddim())):
        with pytest.raises(UserError, match="has no effect"):
            check_call(model, sampler)


def test_a_bill_takes_sizes_from_the_checkpoint_not_from_the_preset_it_borrows():
    model = OmegaConf.to_object(compose(["model=sd14"]).model)
    shapes = input_shapes(model, {"sample_size": 32, "in_channels": 9, "cross_attention_dim": 1024})
    assert shapes == {"sample": [9, 32, 32], "encoder_hidden_states": [77, 1024]}
    assert input_shapes(model, {}) == {name: list(shape) for name, shape in model.inputs.items()}


def test_the_folders_own_architecture_comes_before_the_presets(tmp_path):
    pipeline().save_pretrained(tmp_path)
    own = OmegaConf.to_object(compose(["model=ddpm_cifar10", f"model.path={tmp_path}"]).model)
    assert architecture(own)["sample_size"] == 8
    absent = OmegaConf.to_object(compose(["model=ldm4_imagenet"]).model)
    assert architecture(absent)["sample_size"] == 64


def test_a_pipeline_trained_in_memory_is_quantized_in_eval_mode_and_left_as_it_was():
    pipe = pipeline(dropout=0.5)
    pipe.unet.train().requires_grad_(True)
    twin = clone(pipe)
    assert not twin.unet.training and not any(p.requires_grad for p in twin.unet.parameters())
    assert pipe.unet.training and all(p.requires_grad for p in pipe.unet.parameters())


def test_units_of_a_network_nobody_described_go_by_class():
    network = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=4,
        attention_head_dim=4, mid_block_type=None,
    )  # fmt: skip
    units = default_units(network)
    assert {"down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"} <= set(units)
    assert "down_blocks.0.attentions.0" not in units, "its glue returns a tuple or an output object"
    layers = {name: None for name, module in network.named_modules() if isinstance(module, LAYER_TYPES)}
    assert "down_blocks.0.attentions.0.proj_in" in find_units(network, units, layers)


class Checked(UnconditionalPipeline):
    """A pipeline that blackens what its safety checker dislikes."""

    _optional_components = ["vqvae", "safety_checker"]

    def __init__(self, unet, scheduler, vqvae=None, safety_checker=None):
        super().__init__(unet, scheduler, vqvae)
        self.register_modules(safety_checker=safety_checker)


def test_no_safety_checker_looks_at_samples(tmp_path):
    base = pipeline()
    Checked(base.unet, base.scheduler, safety_checker=base.unet).save_pretrained(tmp_path)
    family = replace(anatomy(base), path=str(tmp_path), pipeline="tests.test_models.Checked")
    assert Checked.from_pretrained(tmp_path).safety_checker is not None and load(family).safety_checker is None
