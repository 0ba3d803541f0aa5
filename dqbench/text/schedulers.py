"""Samplers of masked-diffusion language models as diffusers schedulers: which masked tokens are filled in at a step.

A scheduler sees the region that is generated: logits [B, G, V], tokens [B, G] with mask_token_id where nothing is known
yet. Draws come from each sample's own generator on the CPU. Two things hold beyond the releases: the mask token itself
is never filled in, and how many tokens a step fills in is counted for each sample, not for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from dqbench.errors import UserError, check_choice

Generators = Sequence[torch.Generator] | torch.Generator | None


@dataclass
class MaskedDiffusionSchedulerOutput(BaseOutput):
    """prev_sample: token ids [B, G] after the step; committed: bool [B, G], those that the step filled in."""

    prev_sample: Tensor
    committed: Tensor


class LLaDAScheduler(SchedulerMixin, ConfigMixin):
    """LLaDA's sampler (Nie et al. 2025, arXiv:2502.09992, and its release's generate), block by block.

    remasking: low_confidence (the surest tokens are kept) or random. block_length: None for gen_length, one block,
    which is pure diffusion. logits_eos_inf: the end of text is never filled in. confidence_eos_eot_inf: end of text and
    of turn are filled in last; the release does so at temperature 0 only, here at every temperature.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        gen_length: int = 128,
        block_length: int | None = None,
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        eot_token_id: int | None = None,
    ) -> None:
        check_choice("remasking", remasking, ("low_confidence", "random"))
        check_length("gen_length", gen_length)
        self.block_length = gen_length if block_length is None else block_length
        check_length("block_length", self.block_length)
        if gen_length % self.block_length:
            raise UserError(f"gen_length={gen_length} must be a multiple of block_length={self.block_length}")
        self.init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """timesteps: n - 1 down to 0, in equal parts for each block."""
        num_blocks = self.config.gen_length // self.block_length
        check_length("steps", num_inference_steps)
        if num_inference_steps % num_blocks:
            lengths = f"gen_length {self.config.gen_length}, block_length {self.block_length}"
            line = f"steps={num_inference_steps} must be a multiple of the number of blocks, {num_blocks} ({lengths})"
            raise UserError(line)
        self.num_inference_steps = num_inference_steps
        self.steps_per_block = num_inference_steps // num_blocks
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None
    ) -> MaskedDiffusionSchedulerOutput:
        """Fill in, of the current block's m masked tokens, the ceil(m / remaining steps) of highest confidence.

        Over a block's s steps that is floor(m / s) tokens for each, and one more for the first m mod s.
        """
        generators, masked = per_sample(generator, len(sample)), is_masked(sample, self.config.mask_token_id)
        position = self.num_inference_steps - 1 - int(timestep)
        block, step_in_block = divmod(position, self.steps_per_block)
        candidates, confidence = self._predict(model_output, generators)
        in_block = masked.clone()
        in_block[:, (block + 1) * self.block_length :] = False
        count = -(-in_block.sum(1) // (self.steps_per_block - step_in_block))
        committed = highest(confidence.masked_fill(~in_block, -torch.inf), count)
        return MaskedDiffusionSchedulerOutput(torch.where(committed, candidates, sample), committed)

    def _predict(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Candidates [B, G] and their confidence [B, G], in float64 (the release's: low precision harms Gumbel)."""
        config, logits = self.config, logits.double()
        if config.logits_eos_inf:
            logits = without(logits, "logits_eos_inf", eos_token_id=config.eos_token_id)
        candidates = gumbel_argmax(without(logits, mask_token_id=config.mask_token_id), config.temperature, generators)
        if config.remasking == "random":
            return candidates, uniform(logits.shape[1:2], generators).to(logits.device)
        if config.confidence_eos_eot_inf:
            ends = {"eos_token_id": config.eos_token_id, "eot_token_id": config.eot_token_id}
            logits = without(logits, "confidence_eos_eot_inf", **ends)
        return candidates, of_candidates(logits.softmax(-1), candidates)


class DreamScheduler(SchedulerMixin, ConfigMixin):
    """Dream's sampler (Ye et al. 2025, arXiv:2508.15487, and its release's diffusion_generate): t from 1 to eps.

    alg: origin (each masked token is filled in with probability 1 - s/t), or the surest int(m (1 - s/t)) of the m
    masked tokens by maskgit_plus (probability), topk_margin (lead over the second) or entropy (its negative). alg_temp:
    the tokens to fill in are drawn by softmax(confidence / alg_temp) instead. The last step fills in the rest. Logits
    must already be those of the token they stand at: token_logits() of dqbench.text.networks shifts Dream's.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        gen_length: int = 128,
        alg: str = "origin",
        alg_temp: float | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        eps: float = 1e-3,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        eot_token_id: int | None = None,
    ) -> None:
        check_choice("alg", alg, ("origin", "maskgit_plus", "topk_margin", "entropy"))
        check_length("gen_length", gen_length)
        if not 0 < eps < 1:
            raise UserError(f"eps={eps} is no time to stop at; allowed: between 0 and 1")
        self.init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """timesteps: n - 1 down to 0; times: the n + 1 values of t, 1 to eps."""
        check_length("steps", num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self.times = torch.linspace(1, self.config.eps, num_inference_steps + 1)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None
    ) -> MaskedDiffusionSchedulerOutput:
        """Fill in some of the masked tokens: from time t to the next, s."""
        generators, masked = per_sample(generator, len(sample)), is_masked(sample, self.config.mask_token_id)
        candidates, confidence = self._predict(model_output.float(), generators)
        position, last = self.num_inference_steps - 1 - int(timestep), int(timestep) == 0
        ratio = torch.ones(()) if last else 1 - self.times[position + 1] / self.times[position]
        if self.config.alg == "origin":
            committed = masked & (uniform(sample.shape[1:], generators).to(sample.device) < ratio.double())
        else:
            count = (masked.sum(1).cpu() * ratio).int().to(sample.device)
            committed = highest(self._scores(confidence, generators).masked_fill(~masked, -torch.inf), count)
        return MaskedDiffusionSchedulerOutput(torch.where(committed, candidates, sample), committed)

    def _predict(self, logits: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        config = self.config
        logits = logits / config.temperature if config.temperature > 0 else logits
        allowed = keep_likely(without(logits, mask_token_id=config.mask_token_id), config.top_p, config.top_k)
        candidates = gumbel_argmax(allowed, float(config.temperature > 0), generators)
        p = keep_likely(logits, config.top_p, config.top_k).softmax(-1)
        if config.alg == "topk_margin":
            first, second = p.topk(2).values.unbind(-1)
            return candidates, first - second
        if config.alg == "entropy":
            return candidates, (p * (p + 1e-10).log()).sum(-1)
        return candidates, of_candidates(p, candidates)

    def _scores(self, confidence: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Confidence; with alg_temp plus Gumbel noise, whose highest are a draw without replacement."""
        if not self.config.alg_temp:
            return confidence
        noise = gumbel(confidence.shape[1:], generators).to(confidence.device)
        return confidence.double() / self.config.alg_temp + noise


def check_length(key: str, value: int) -> None:
    """Raise UserError unless `value` counts something."""
    if value < 1:
        raise UserError(f"{key}={value} is too few; allowed: 1 or more")


def is_masked(sample: Tensor, mask_token_id: int | None) -> Tensor:
    """Where the tokens [B, G] are masked."""
    if mask_token_id is None:
        raise UserError("the scheduler has no mask_token_id; a pipeline gives it its network's")
    return sample == mask_token_id


def without(logits: Tensor, flag: str = "the sampler", **tokens: int | None) -> Tensor:
    """Logits [..., V] with -inf for some tokens. Raises UserError where the vocabulary names no such token."""
    for name, token in tokens.items():
        if token is None:
            raise UserError(f"{flag} needs {name}, which neither the scheduler's config nor the tokenizer names")
    return logits.index_fill(-1, torch.tensor(list(tokens.values()), device=logits.device), -torch.inf)


def keep_likely(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits [..., V], -inf but for the fewest tokens whose probability exceeds top_p and the top_k likeliest."""
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        logits = logits.masked_fill((p.cumsum(-1) - p > top_p).gather(-1, order.argsort(-1)), -torch.inf)
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def gumbel_argmax(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """A draw [B, G] from softmax(logits / temperature): argmax of logits - temperature log(-log u), in float64."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = gumbel(logits.shape[1:], generators).to(logits.device)
    return (logits.double() + temperature * noise).argmax(-1)


def gumbel(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard Gumbel noise [B, *shape], float64: -log(-log u)."""
    return -(-uniform(shape, generators).log()).log()


def uniform(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws from [0, 1), float64 [B, *shape] on the CPU, each row from its sample's generator."""
    return torch.stack([torch.rand(*shape, generator=one, dtype=torch.float64) for one in generators])


def of_candidates(p: Tensor, candidates: Tensor) -> Tensor:
    """The candidates' entries [B, G] of p [B, G, V]."""
    return p.gather(-1, candidates[..., None])[..., 0]


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Where each row's count [B] highest scores [B, G] are; of equal ones the first."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < count[:, None]


def per_sample(generator: Generators, count: int) -> Sequence[torch.Generator]:
    """One generator for each sample; a single one (None: torch's own) serves all in turn."""
    if generator is None or isinstance(generator, torch.Generator):
        return [torch.default_generator if generator is None else generator] * count
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators for {count} samples; give one for each")
    return generator
