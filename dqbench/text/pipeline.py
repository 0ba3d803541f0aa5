"""MaskedDiffusionPipeline: prompts -> texts, with any masked-diffusion network and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dqbench.errors import UserError, check_choice
from dqbench.metrics.guards import DegenerateSamples
from dqbench.text.networks import token_logits
from dqbench.text.schedulers import Generators, per_sample

disable_progress_bar()  # of loading weights; the stages have their own
Prompt = str | Sequence[str] | Sequence[Sequence[int]] | Tensor


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """sequences: token ids [B, L], padding and prompt included; generated: their last G; texts: G decoded, to its end.

    texts is None for token ids ("pt", "np") and without a tokenizer.
    """

    sequences: Tensor | np.ndarray
    generated: Tensor | np.ndarray
    texts: list[str] | None = None


class MaskedDiffusionPipeline(DiffusionPipeline):
    """Text from a network that predicts masked tokens: the answer starts as masks, the sampler fills them in."""

    modality = "text"
    _optional_components = ["tokenizer"]

    def __init__(self, model: Any, scheduler: Any, tokenizer: Any | None = None) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        self._name_tokens()

    def _name_tokens(self) -> None:
        """Tell the scheduler which tokens are the mask and the end, where its config does not."""
        mask, end = getattr(self.model.config, "mask_token_id", None), getattr(self.tokenizer, "eos_token_id", None)
        known = {key: self.scheduler.config.get(key) for key in ("mask_token_id", "eos_token_id")}
        for key, token in {"mask_token_id": mask, "eos_token_id": end}.items():
            if known[key] is None and token is not None:
                self.scheduler.register_to_config(**{key: token})

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        generator: Generators = None,
        num_inference_steps: int = 128,
        guidance_scale: float = 0.0,
        output_type: str = "text",
    ) -> MaskedDiffusionOutput:
        """Complete texts or token ids [[...], ...] by scheduler.config.gen_length tokens each.

        guidance_scale: w of un + (w + 1) (l - un), un without the prompt, as in LLaDA's release; 0 is none.
        output_type: "text", or token ids alone as "pt" or "np".
        """
        check_choice("output_type", output_type, ("text", "pt", "np"))
        self._name_tokens()
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        ids, padding = self._encode(prompt)
        generators = per_sample(generator, len(ids))
        x, guide = self._masked(len(ids)), Guide(ids, padding, guidance_scale, self.scheduler.config.mask_token_id)
        for t in self.progress_bar(self.scheduler.timesteps):
            logits = check_numbers(guide.logits(self.model, x), int(t))
            x = self.scheduler.step(logits, t, x, generator=generators).prev_sample
        return self._output(torch.cat([ids, x], dim=1), output_type)

    def _masked(self, count: int) -> Tensor:
        """The answers at the start: all masks, [B, G]."""
        config, device = self.scheduler.config, self._execution_device
        if config.mask_token_id is None:
            raise UserError("neither the scheduler's nor the network's config names a mask_token_id")
        return torch.full((count, config.gen_length), config.mask_token_id, device=device)

    def _encode(self, prompt: Prompt) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, P], padded on the left, and where they are tokens [B, P]; None if all are."""
        rows = self._rows(prompt)
        longest = max(map(len, rows), default=0)
        ids = torch.full((len(rows), longest), self._pad_token_id(), device=self._execution_device)
        tokens = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.as_tensor(row, dtype=torch.long)
            tokens[i, longest - len(row) :] = 1
        return ids, None if tokens.all() else tokens

    def _rows(self, prompt: Prompt) -> list[Any]:
        """The prompts as lists of token ids. Raises UserError for texts without a tokenizer, or no prompt at all."""
        rows = [prompt] if isinstance(prompt, str) else list(prompt)
        if not rows:
            raise UserError("no prompt was given; allowed: a list of texts or of token ids")
        if not isinstance(rows[0], str):
            return rows
        if self.tokenizer is None:
            raise UserError("the pipeline has no tokenizer; give prompts as token ids")
        return self.tokenizer(rows)["input_ids"]

    def _pad_token_id(self) -> int:
        """The tokenizer's or the network's padding; it is never attended to, so any token will do."""
        found = getattr(self.tokenizer, "pad_token_id", None)
        found = getattr(self.model.config, "pad_token_id", None) if found is None else found
        return 0 if found is None else found

    def _output(self, sequences: Tensor, output_type: str) -> MaskedDiffusionOutput:
        length = self.scheduler.config.gen_length
        texts = self._decode(sequences[:, -length:]) if output_type == "text" and self.tokenizer is not None else None
        if output_type == "np":
            sequences = sequences.cpu().numpy()
        return MaskedDiffusionOutput(sequences, sequences[:, -length:], texts)

    def _decode(self, generated: Tensor) -> list[str]:
        """Texts up to the first end-of-text token."""
        rows = [self.until_end(row) for row in generated.tolist()]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def until_end(self, ids: list[int]) -> list[int]:
        """Token ids before the first end of text."""
        return until(self.scheduler.config.eos_token_id, ids)


def until(end: int | None, ids: list[int]) -> list[int]:
    """Token ids before the first `end`; all where there is none."""
    return ids[: ids.index(end)] if end in ids else ids


@dataclass(frozen=True)
class Guide:
    """Prompts ids [B, P] and where they are tokens [B, P]; the network is asked with them and, guided, without."""

    ids: Tensor
    tokens: Tensor | None
    scale: float
    mask_token_id: int

    def logits(self, network: Any, x: Tensor) -> Tensor:
        """Logits [B, G, V] of the answers x [B, G]; with guidance both halves pass the network in one batch."""
        prompts, tokens = self.ids, self.tokens
        if self.scale != 0:
            hidden = torch.full_like(self.ids, self.mask_token_id)
            prompts, x = torch.cat([self.ids, hidden]), torch.cat([x, x])
            tokens = None if tokens is None else torch.cat([tokens, tokens])
        attended = None if tokens is None else torch.cat([tokens, torch.ones_like(x)], dim=1)
        logits = token_logits(network, torch.cat([prompts, x], dim=1), attended)[:, -x.shape[1] :]
        if self.scale == 0:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.scale + 1) * (conditional - unconditional)


def check_numbers(logits: Tensor, t: int) -> Tensor:
    """The logits. Raises DegenerateSamples for NaN, which a sampler would turn into tokens that look like any other."""
    if logits.isnan().any():
        raise DegenerateSamples(f"the network's logits are NaN at timestep {t}; its samples mean nothing")
    return logits
