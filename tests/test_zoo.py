"""The miniatures that ship with the package, and the script that trains them."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from dqbench.errors import UserError
from dqbench.zoo import card, train
from dqbench.zoo.classifier import DigitsClassifier, shift
from dqbench.zoo.data import DigitsRGB, digits, digits_uint8, split

DDPM, CLASSIFIER = train.ZOO / "digits_ddpm", train.ZOO / "digits_classifier"


def test_digits_are_the_same_data_in_every_form():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    assert labels.bincount().min() > 170 and len(labels.unique()) == 10
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), digits_uint8())
    assert torch.equal(DigitsRGB()[3], digits_uint8()[3].repeat(3, 1, 1))


def test_split_covers_the_digits_once_and_keeps_the_classes_in_proportion():
    first, second = split(0.2, seed=1)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(1797))
    labels = digits()[1]
    assert ((labels[second].bincount() / labels.bincount() - 0.2).abs() < 0.004).all()
    assert torch.equal(split(0.2, seed=1)[1], second) and not torch.equal(split(0.2, seed=2)[1], second)


def test_shipped_unet_has_every_kind_of_unit_and_fits():
    pipe = DiffusionPipeline.from_pretrained(DDPM)
    unet, scheduler = pipe.unet, pipe.scheduler
    assert isinstance(unet, UNet2DModel) and isinstance(scheduler, DDPMScheduler)
    assert len(unet.down_blocks) == 3 and sum(hasattr(block, "attentions") for block in unet.down_blocks) == 1
    assert all(resnet.conv_shortcut is not None for block in unet.up_blocks for resnet in block.resnets)
    assert all(p.dtype == torch.float32 for p in unet.parameters())
    assert (DDPM / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 5e6
    assert (scheduler.config.num_train_timesteps, scheduler.config.prediction_type) == (1000, "epsilon")


@pytest.mark.parametrize("name", ["digits_ddpm", "digits_classifier"])
def test_shipped_weights_are_the_ones_that_were_measured(name):
    model = DiffusionPipeline.from_pretrained(DDPM).unet if name == "digits_ddpm" else load_classifier()
    measured = train.load_settings(name).build_task().evaluate(model)
    recorded = json.loads((train.ZOO / name / "training.json").read_text())
    assert measured == pytest.approx({key: recorded[key] for key in measured}, rel=1e-3)
    assert recorded.get("accuracy", 1) >= 0.98


def test_samples_are_digits_of_all_classes():
    logits = card.classify(card.sample(DDPM, 128))["logits"]
    assert card.confident_share(logits) >= 0.9
    assert min(card.class_shares(logits.argmax(1))) >= 0.03


def test_classifier_card_states_what_was_recorded():
    assert (CLASSIFIER / "README.md").read_text() == card.classifier_card(CLASSIFIER, 0)


def test_shift_moves_each_image_by_at_most_one_pixel():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 4, 4] = 1
    moved = shift(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert ((moved == 1).sum((1, 2, 3)) == 1).all() and (moved.sum((1, 2, 3)) == -62).all()


def test_killed_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    settings = small_settings()
    train.train(settings, tmp_path / "whole", "cpu")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step = train.Trainer.step
        patch.setattr(train.Trainer, "step", lambda self: killed() if self.iteration == 5 else step(self))
        train.train(settings, tmp_path / "killed", "cpu")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    seen = []
    monkeypatch.setattr(train.Trainer, "step", lambda self: seen.append(self.iteration) or step(self))
    report = train.train(settings, tmp_path / "killed", "cpu")
    assert seen == [4, 5, 6]  # the checkpoint of iteration 4, not a new start
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole) and report["iterations"] == 7
    assert not list((tmp_path / "killed").glob("*.pt"))


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer = train.Trainer(small_settings(), "cpu")
    train.save_atomic(trainer.state_dict(), tmp_path / "state.pt")
    trainer.settings.max_lr = 0.5
    with pytest.raises(UserError, match="other settings"):
        train.resume(trainer, tmp_path / "state.pt")


def test_unknown_miniature_lists_the_known_ones():
    with pytest.raises(UserError, match="no miniature named 'dogs'; known: digits_classifier, digits_ddpm"):
        train.load_settings("dogs")


def load_classifier() -> DigitsClassifier:
    return DigitsClassifier.from_pretrained(CLASSIFIER)


def small_settings() -> train.Settings:
    settings = train.load_settings("digits_classifier")
    settings.iterations, settings.batch_size, settings.checkpoint_every = 7, 16, 2
    return settings


def killed() -> float:
    raise KeyboardInterrupt
