"""Denoisers of masked-diffusion language models: transformers' own decoders, every position attending to every other.

Module names and state-dict keys are those of the parent class. No remote code: LLaDA is a Llama, Dream a Qwen2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM  # noqa: F401 (diffusers asks for the base)


class BidirectionalLlama(LlamaForCausalLM):
    """LLaDA's network (Nie et al. 2025, arXiv:2502.09992)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits [B, L, V] as `.logits` for token ids [B, L]; attention_mask [B, L]: 1 for tokens, 0 for padding."""
        mask = additive_mask(input_ids, attention_mask, self.dtype)
        return super().forward(input_ids, attention_mask=mask, use_cache=False, **kwargs)


class BidirectionalQwen2(Qwen2ForCausalLM):
    """Dream's network (Ye et al. 2025, arXiv:2508.15487). Output i - 1 predicts token i."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits [B, L, V] as `.logits` for token ids [B, L]; attention_mask [B, L]: 1 for tokens, 0 for padding."""
        mask = additive_mask(input_ids, attention_mask, self.dtype)
        return super().forward(input_ids, attention_mask=mask, use_cache=False, **kwargs)


def additive_mask(input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores, [B, 1, L, L]: 0 for tokens, the lowest number for padding."""
    batch, length = input_ids.shape
    mask = torch.zeros(batch, 1, 1, length, dtype=dtype, device=input_ids.device)
    if attention_mask is not None:
        mask.masked_fill_(attention_mask[:, None, None, :] == 0, torch.finfo(dtype).min)
    return mask.expand(batch, 1, length, length)
