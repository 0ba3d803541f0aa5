"""What conditions a sample, and where checkpoints come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.launching.preflight import check_call
from dqbench.models import anatomy, architecture, clone, conditions, denoiser, input_shapes, load, resolve
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
