"""Quantized attention matmuls: q, k, v and the softmax output, through diffusers' attention-processor seam."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from dqbench.errors import UserError

PARTS = ("q", "k", "v", "softmax")


class QuantAttnProcessor(nn.Module):
    """diffusers' AttnProcessor with quantizers on q, k, v [B, L, C] and on the softmax output [B x heads, L, L'].

    A per-tensor quantizer commutes with the split into heads, so it may act on q, k, v as the projections return them.
    """

    def __init__(self, quantizers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict(quantizers)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """diffusers' attention on a view of `attn` whose projections and scores are quantized."""
        view = _QuantizedView(attn, self.quantizers)
        return AttnProcessor()(view, hidden_states, encoder_hidden_states, attention_mask, temb)


class _QuantizedView:
    """Everything of `attn`, but to_q, to_k, to_v and get_attention_scores return quantized tensors."""

    def __init__(self, attn: Attention, quantizers: nn.ModuleDict) -> None:
        self._attn, self._quantizers = attn, quantizers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def _apply(self, part: str, x: Tensor) -> Tensor:
        return self._quantizers[part](x) if part in self._quantizers else x

    def to_q(self, x: Tensor) -> Tensor:
        return self._apply("q", self._attn.to_q(x))

    def to_k(self, x: Tensor) -> Tensor:
        return self._apply("k", self._attn.to_k(x))

    def to_v(self, x: Tensor) -> Tensor:
        return self._apply("v", self._attn.to_v(x))

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._apply("softmax", self._attn.get_attention_scores(query, key, attention_mask))


def attention_layers(denoiser: nn.Module) -> dict[str, Attention]:
    """diffusers' Attention modules by name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, Attention)}


def check_quantizable(denoiser: nn.Module) -> None:
    """Raise UserError for attention that QuantAttnProcessor would miss, or compute as something else."""
    for name, module in denoiser.named_modules():
        if hasattr(module, "processor") and (reason := peculiarity(module)):
            raise UserError(f"attention of {name} cannot be quantized: {reason}; allowed here: method.attention=false")


def peculiarity(attn: nn.Module) -> str | None:
    """What a module does beyond diffusers' plain attention, in words; None where nothing."""
    if not isinstance(attn, Attention):
        return f"it is a {type(attn).__name__}, not diffusers' Attention"
    if type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {type(attn.processor).__name__}, not AttnProcessor or AttnProcessor2_0"
    found = {
        "it has added projections": attn.add_k_proj is not None,
        "it normalizes q or k": attn.norm_q is not None or attn.norm_k is not None,
        "its projections are fused": attn.fused_projections,
        "its keys have fewer heads than its queries": attn.inner_kv_dim != attn.inner_dim,
        "it has no output projection": attn.to_out is None,
    }
    return next((reason for reason, true in found.items() if true), None)


def attention_groups(model: nn.Module) -> int:
    """Scales of each quantizer at the attention matmuls: 1, or one per sampling step."""
    processors = (attn.processor for attn in attention_layers(model).values())
    found = (processor.quantizers.values() for processor in processors if isinstance(processor, QuantAttnProcessor))
    return max((quantizer.scale.numel() for quantizers in found for quantizer in quantizers), default=1)
