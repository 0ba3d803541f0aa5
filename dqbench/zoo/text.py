"""Masked diffusion of characters: the miniature language model, trained with LLaDA's loss on tasks and English."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from dqbench.sampling import generators
from dqbench.text.likelihood import count_masks, nll_bound, per_token
from dqbench.text.networks import BidirectionalLlama
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler
from dqbench.text.tasks import (
    ANSWER_LENGTH,
    ENGLISH_LENGTH,
    PROMPT_LENGTH,
    encode,
    english,
    english_rows,
    exact_match,
    rows,
)
from dqbench.text.tokenizer import character_tokenizer

MASK_SEED = 0


@dataclass
class TextDiffusion:
    network: dict[str, Any]  # arguments of transformers.LlamaConfig; those of the vocabulary come from the tokenizer
    scheduler: dict[str, Any]  # arguments of LLaDAScheduler
    compile: bool  # by torch.compile, which needs a C++ compiler
    autocast: str  # dtype of the matrix products in training
    min_probability: float  # eps of LLaDA's masking probability
    mix: dict[str, float]  # share of the rows of a batch
    pool: dict[str, int]  # different training questions of each task
    evaluated: dict[str, int]  # held-out questions of each task
    mask_draws: int  # per row of held-out English

    def __post_init__(self) -> None:
        self.tokenizer = character_tokenizer()

    @cached_property
    def questions(self) -> dict[str, Tensor]:
        """Training rows [N, 20] of each task."""
        return {task: encode(*rows(task, "train", count, seed=0)) for task, count in self.pool.items()}

    def model(self) -> BidirectionalLlama:
        ids = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "mask")}
        config = LlamaConfig(**self.network, **ids, bos_token_id=None, vocab_size=len(self.tokenizer))
        network = BidirectionalLlama(config)
        if self.compile:
            network.compile(dynamic=False)
        return network

    def loss(self, model: nn.Module, batch_size: int, generator: Generator) -> Tensor:
        """LLaDA's loss on a batch of questions, where prompts are never masked, plus that on a batch of English."""
        counts = {name: round(share * batch_size) for name, share in self.mix.items()}
        questions = torch.cat([draw(pool, counts[task], generator) for task, pool in self.questions.items()])
        text = draw(english("train").unfold(0, ENGLISH_LENGTH, 1), counts["english"], generator)
        return self._loss_on(model, questions, PROMPT_LENGTH, generator) + self._loss_on(model, text, 0, generator)

    def _loss_on(self, model: nn.Module, ids: Tensor, prompt_length: int, generator: Generator) -> Tensor:
        """(1 / (B L)) sum over masked tokens of CE / p, L without the prompt (LLaDA, arXiv:2502.09992, eq. 3)."""
        device = next(model.parameters()).device
        probability = self._probability(len(ids), generator)[:, None].expand(ids.shape)
        masked = torch.rand(ids.shape, generator=generator) < probability
        masked[:, :prompt_length] = False
        noisy = ids.masked_fill(masked, self.tokenizer.mask_token_id)
        with torch.autocast(device.type, getattr(torch, self.autocast)):
            logits = model(noisy.to(device)).logits.cpu()
        loss = F.cross_entropy(logits[masked].float(), ids[masked], reduction="none") / probability[masked]
        return loss.sum() / ids[:, prompt_length:].numel()

    def _probability(self, count: int, generator: Generator) -> Tensor:
        """p = (1 - eps) t + eps, [B]; t in (0, 1), one draw from each of B equal intervals."""
        t = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        return (1 - self.min_probability) * t + self.min_probability

    def evaluate(self, model: BidirectionalLlama) -> dict[str, float]:
        """Of the weights as they are shipped, on what was held out: exact match per task, bits per character."""
        pipe = self.pipeline(shipped(model).float())
        exact = {f"exact_{task}": solve(pipe, task, "held_out", count) for task, count in self.evaluated.items()}
        bits = english_bits(pipe.model, "held_out", self.mask_draws)
        return {key: values.double().mean().item() for key, values in (exact | {"bits_per_character": bits}).items()}

    def pipeline(self, network: BidirectionalLlama) -> MaskedDiffusionPipeline:
        return MaskedDiffusionPipeline(network, LLaDAScheduler(**self.scheduler), self.tokenizer)

    def save(self, model: BidirectionalLlama, folder: Path) -> None:
        self.pipeline(shipped(model)).save_pretrained(folder, safe_serialization=True)


def shipped(model: BidirectionalLlama) -> BidirectionalLlama:
    """A copy in float16."""
    return copy.deepcopy(model).half()


def solve(pipe: MaskedDiffusionPipeline, task: str, split: str, count: int, steps: int = ANSWER_LENGTH) -> Tensor:
    """Which of `count` questions the pipeline's sampler answers right: [count] bool. One generator per question."""
    pipe.set_progress_bar_config(disable=True)
    prompts, answers = rows(task, split, count, seed=1)
    return exact_match(pipe(prompts, generators(range(count)), num_inference_steps=steps).texts, answers)


def english_bits(network: nn.Module, split: str, draws: int, every: int = 1) -> Tensor:
    """Upper bound on the bits per character of every n-th row of English: [N]."""
    ids = english_rows(split)[::every]
    target = torch.ones_like(ids, dtype=torch.bool)
    return per_token(nll_bound(network, ids, count_masks(target, draws, MASK_SEED)), target)


def draw(pool: Tensor, count: int, generator: Generator) -> Tensor:
    return pool[torch.randint(len(pool), (count,), generator=generator)]
