"""Measure a miniature and write its model card: `python -m dqbench.zoo.card digits_ddpm`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from dqbench.metrics.statistics import frechet
from dqbench.progress import track
from dqbench.sampling import generators, to_uint8
from dqbench.zoo.classifier import DigitsClassifier
from dqbench.zoo.data import digits, digits_uint8, split
from dqbench.zoo.text_card import text_card

ZOO = Path(__file__).parent
BATCH = 250
STEPS = 50
HALVES_SEED = 0

DDPM_CARD = """# digits_ddpm

A class-free diffusion model of 8x8 handwritten digits, small enough to quantize on a CPU in a minute.

- Data: all 1,797 digits that ship with scikit-learn (`load_digits`; UCI Optical Recognition of Handwritten Digits).
- Model: diffusers `UNet2DModel`, three levels, the middle one with attention, {parameters:,} parameters, float32.
- Training: DDPM, 1,000 steps, linear betas, noise prediction; {iterations:,} iterations of {batch_size}, seed {seed}, \
averaged weights; settings in `dqbench/zoo/digits_ddpm.yaml`. {minutes:.0f} minutes on {device} ({threads} threads), \
torch {torch}. Loss of the averaged weights over all digits: {loss:.4f}.

Measured on {num_samples:,} samples (DDIM, {steps} steps, eta 0, seeds 0 to {last_seed}) with the digits classifier:

| | samples | real digits |
|---|---|---|
| classifier's confidence >= 0.9 | {confident:.1%} | {real_confident:.1%} |
| Fréchet distance to all real digits | {fd:.2f} | 0 |
| the same, {half} images against the other half of the real digits | {fd_half:.2f} | {fd_real_half:.2f} |

Share of samples per class, 0 to 9: {shares}. Real digits have {real_shares}.

The distances are on the classifier's `pooled` features: not FID, and not comparable with other extractors. The model
saw all real digits, so a low distance says nothing about novelty: it serves to compare a quantized model with this one.

    python -m dqbench.zoo.train digits_ddpm     # trains it again, about 10 minutes on 2 idle CPU cores
    python -m dqbench.zoo.card digits_ddpm      # measures it and writes this card
"""

CLASSIFIER_CARD = """# digits_classifier

Scores the samples of `digits_ddpm`: 10 logits, {width} `pooled` features, 128 `spatial` features (8 channels at 4x4).

- Data: scikit-learn's digits, {train} to train (shifted by up to one pixel), {held_out} held out, stratified, seed 0.
- Model: four 3x3 convolutions, {parameters:,} parameters; features are normalized over channels.
- Training: {iterations:,} iterations of {batch_size}, seed {seed}, averaged weights; settings in
  `dqbench/zoo/digits_classifier.yaml`. {seconds} seconds on {device}, torch {torch}.
- Held out: accuracy {accuracy:.2%}, cross entropy {loss:.3f}, confidence >= 0.9 on {confident:.1%}.

    python -m dqbench.zoo.train digits_classifier     # trains it again
    python -m dqbench.zoo.card digits_classifier      # writes this card
"""


@torch.no_grad()
def sample(folder: Path, count: int) -> Tensor:
    """DDIM samples of seeds 0 to count-1: [count, 1, 8, 8] uint8."""
    pipe = DDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    batches = []
    spans = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    for seeds in track(spans, "samples", count):
        images = pipe(len(seeds), generators(seeds), num_inference_steps=STEPS, output_type="np").images
        batches.append(to_uint8(images))
    return torch.from_numpy(np.concatenate(batches)).permute(0, 3, 1, 2)


@torch.no_grad()
def classify(images: Tensor) -> dict[str, Tensor]:
    """The classifier's outputs for [N, 1, 8, 8] uint8."""
    return DigitsClassifier.from_pretrained(ZOO / "digits_classifier")(images / 127.5 - 1)


def confident_share(logits: Tensor) -> float:
    return (logits.softmax(1).amax(1) >= 0.9).double().mean().item()


def class_shares(labels: Tensor) -> list[float]:
    return (labels.bincount(minlength=10) / len(labels)).tolist()


def distance(features: Tensor, reference: Tensor) -> float:
    return frechet(features, fid_features_to_statistics(reference))[0]


def measure_ddpm(folder: Path, count: int) -> dict[str, Any]:
    """The numbers of the card, and the samples' distance beside the one between two halves of the real digits."""
    first, second = split(0.5, HALVES_SEED)
    real, fake = classify(digits_uint8()), classify(sample(folder, count))
    return {
        "num_samples": count,
        "last_seed": count - 1,
        "steps": STEPS,
        "half": len(second),
        "confident": confident_share(fake["logits"]),
        "real_confident": confident_share(real["logits"]),
        "fd": distance(fake["pooled"], real["pooled"]),
        "fd_half": distance(fake["pooled"][: len(second)], real["pooled"][first]),
        "fd_real_half": distance(real["pooled"][second], real["pooled"][first]),
        "class_shares": class_shares(fake["logits"].argmax(1)),
        "real_class_shares": class_shares(digits()[1]),
    }


def ddpm_card(folder: Path, count: int) -> str:
    measured = measure_ddpm(folder, count)
    print(json.dumps(measured, indent=2))
    training = json.loads((folder / "training.json").read_text())
    real = measured["real_class_shares"]
    return DDPM_CARD.format(
        **training,
        **measured,
        minutes=training["seconds"] / 60,
        shares=", ".join(f"{share:.1%}" for share in measured["class_shares"]),
        real_shares=f"{min(real):.1%} to {max(real):.1%} each",
    )


def classifier_card(folder: Path, count: int) -> str:
    """`count` is of no use here: the held-out digits were measured when training ended."""
    training = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    return CLASSIFIER_CARD.format(**training, **config, train=len(digits()[1]) - training["held_out"])


CARDS: dict[str, Callable[[Path, int], str]] = {
    "digits_ddpm": ddpm_card,
    "digits_classifier": classifier_card,
    "text_mdlm": text_card,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dqbench.zoo.card", description=__doc__)
    parser.add_argument("name", choices=CARDS)
    parser.add_argument("--folder", type=Path, help="what to measure (default: the one shipped with the package)")
    parser.add_argument("--samples", type=int, default=2000, help="images, or questions of each task")
    args = parser.parse_args(argv)
    folder = args.folder or ZOO / args.name
    card = CARDS[args.name](folder, args.samples)
    (folder / "README.md").write_text(card)
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
