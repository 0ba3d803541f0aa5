"""Denoisers of masked-diffusion language models: transformers' own decoders, every position attending to every other.

Module names, state-dict keys, outputs are those of the parent class. No remote code: LLaDA is a Llama, Dream a Qwen2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM  # noqa: F401 (diffusers asks for the base)

NETWORKS = ("BidirectionalLlama", "BidirectionalQwen2")  # what an architecture may name


class BidirectionalLlama(LlamaForCausalLM):
    """LLaDA's network (Nie et al. 2025, arXiv:2502.09992)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits [B, L, V] as `.logits` for token ids [B, L]; attention_mask [B, L]: 1 for tokens, 0 for padding."""
        return super().forward(input_ids, **{**bidirectional(input_ids, attention_mask, self.dtype), **kwargs})


class BidirectionalQwen2(Qwen2ForCausalLM):
    """Dream's network (Ye et al. 2025, arXiv:2508.15487). Its output i - 1 predicts token i: token_logits() shifts."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits [B, L, V] as `.logits` for token ids [B, L]; attention_mask [B, L]: 1 for tokens, 0 for padding."""
        return super().forward(input_ids, **{**bidirectional(input_ids, attention_mask, self.dtype), **kwargs})


def token_logits(network: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the network predicts for each token, [B, L, V]: its outputs, one to the right where config.shift_logits.

    Dream keeps the shift of the autoregressive model it was initialized from; token 0 then gets output 0.
    """
    masked = {} if attention_mask is None else {"attention_mask": attention_mask}
    logits = network(input_ids=input_ids, **masked).logits
    if not getattr(network.config, "shift_logits", False):
        return logits
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def bidirectional(input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that make a causal decoder attend both ways, its positions counted from the first token on."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    mask = additive_mask(input_ids, attention_mask, dtype)
    return {"attention_mask": mask, "position_ids": positions, "use_cache": False}


def additive_mask(input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores, [B, 1, L, L]: 0 for tokens, the lowest number for padding."""
    batch, length = input_ids.shape
    mask = torch.zeros(batch, 1, 1, length, dtype=dtype, device=input_ids.device)
    if attention_mask is not None:
        mask.masked_fill_(attention_mask[:, None, None, :] == 0, torch.finfo(dtype).min)
    return mask.expand(batch, 1, length, length)
