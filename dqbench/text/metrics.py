"""Scores of a language model: exact answers by task, and a Monte-Carlo bound of the likelihood of held-out text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.stats import binomtest
from torch import Tensor

from dqbench.config import Model
from dqbench.errors import UserError, check_choice
from dqbench.metrics.base import Metric, mean_interval
from dqbench.metrics.measure import resample
from dqbench.models import denoiser
from dqbench.text import tasks
from dqbench.text.data import TASKS, answers, check_rows, content_hash, token_rows
from dqbench.text.likelihood import count_masks, nll_bound, per_token, rate_masks
from dqbench.text.pipeline import until
from dqbench.text.tokenizer import character_tokenizer

MASKS = {"count": count_masks, "rate": rate_masks}  # LLaDA's and Dream's


@dataclass
class Likelihood:
    """Of which held-out rows, how many, with how many masks each; masks: count (LLaDA) | rate (Dream)."""

    rows: str
    count: int
    draws: int
    masks: str
    length: int | None  # tokens of a row of a text file


@dataclass
class TextMetrics:
    version: int
    tasks: bool
    likelihood: Likelihood
    bootstrap: int  # resamples behind the paired difference
    batch_size: int
    seed: int

    modalities = ("text",)

    def check(self, reference: str | None, num_samples: int) -> None:
        """Raise UserError for what could not be scored."""
        check_choice("metrics.likelihood.masks", self.likelihood.masks, MASKS)
        for key, value, least in (
            ("likelihood.count", self.likelihood.count, 2),
            ("likelihood.draws", self.likelihood.draws, 1),
            ("bootstrap", self.bootstrap, 2),
        ):
            if value < least:
                raise UserError(f"metrics.{key}={value} is out of range; allowed: {least} or more")
        if self.tasks and reference != TASKS:
            raise UserError(f"model.data={reference} has no answers to check; allowed: metrics.tasks=false")
        own = self.likelihood
        check_rows(reference, "metrics.likelihood", own.rows, own.length)
        if reference == TASKS:
            tasks.token_rows(own.rows, "held_out", own.count, 0)  # raises where there are fewer

    def score(
        self, samples: np.ndarray, reference: str | None, cache_dir: Path, *, device: str = "cpu"
    ) -> dict[str, Metric]:
        """Share of right answers in token ids [N, G], by task and over all."""
        if not self.tasks:
            return {}
        tokenizer, asked = character_tokenizer(), answers(len(samples))
        texts = tokenizer.batch_decode([until(tokenizer.eos_token_id, row) for row in samples.tolist()])
        right = tasks.exact_match(texts, [answer for _, answer in asked]).double()
        groups = {"": range(len(asked))} | {
            f"_{task}": [i for i, (own, _) in enumerate(asked) if own == task] for task, _ in dict.fromkeys(asked[:4])
        }
        return {f"exact{name}": self.share(right[list(rows)]) for name, rows in groups.items()}

    def score_network(self, pipe: DiffusionPipeline, model: Model) -> dict[str, Metric]:
        """The bound, in bits per token, of the network itself; the masks are the same for every network."""
        own = self.likelihood
        ids = token_rows(model, pipe.tokenizer, own.rows, "held_out", own.count, own.length)
        target = torch.ones_like(ids, dtype=torch.bool)
        masks = MASKS[own.masks](target, own.draws, self.seed)
        bits = per_token(nll_bound(denoiser(pipe), ids, masks, batch_size=self.batch_size), target)
        given = f"upper bound, {own.draws} {own.masks} masks per row of {ids.shape[1]} tokens, {own.rows}"
        return {"nll_bits": self.metric(bits, "logits", f"{given}, bits per token; t interval over rows", False)}

    def share(self, right: Tensor) -> Metric:
        """The share of right answers [N] with Wilson's interval, which stays within [0, 1], and its resamples."""
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, "wilson")
        protocol = "held-out questions, the whole answer must be right; Wilson's interval"
        found = self.metric(right, "answers", protocol, True)
        return replace(found, low=float(interval.low), high=float(interval.high))

    def metric(self, values: Tensor, extractor: str, protocol: str, higher_is_better: bool) -> Metric:
        """The mean over rows [N], its interval and resamples."""
        mean, half = mean_interval(values.numpy())
        draws = resample(lambda rows: (float(rows.mean()),), values, self.bootstrap, self.seed)
        resamples = tuple(draws[:, 0].tolist())
        return Metric(mean, mean - half, mean + half, len(values), extractor, protocol, higher_is_better, resamples)

    def reference_hash(self, reference: str | None, cache_dir: Path, *, device: str = "cpu") -> str | None:
        """Of the questions and texts that are asked."""
        return content_hash(reference)

    def weights_hash(self) -> None:
        """No extractor looks at the samples."""
        return None
