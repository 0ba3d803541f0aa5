"""Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721) where it leaves the function of a network as it is.

A producer's channel j is divided by s_j, the columns that read it are multiplied by it: s_j = sqrt(r1_j / r2_j) makes
their ranges equal. Pairs: a norm's gain -> q, k, v or gate, up; v -> o, where the query heads of a group share their
key-value head's scales; up -> down (not gate, which passes a nonlinearity); conv -> ReLU -> conv in a Sequential.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

PRODUCERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Pair:
    """A producer, and the layers that read its channels and nothing else does.

    repeat: consecutive head copies of the producer's channels among the readers' columns (grouped-query attention):
    heads of `head` channels each appear `repeat` times in a row.
    """

    producer: nn.Module
    readers: Sequence[nn.Module]
    head: int = 1
    repeat: int = 1

    def expand(self, scale: Tensor) -> Tensor:
        """scale [C] of the producer's channels as the readers see them, [C repeat]."""
        return scale.reshape(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def gather(self, columns: Tensor) -> Tensor:
        """The largest of the readers' values [C repeat] for each of the producer's channels, [C]."""
        return columns.reshape(-1, self.repeat, self.head).amax(1).reshape(-1)


@torch.no_grad()
def equalize(network: nn.Module, skip: Sequence[nn.Module] = ()) -> int:
    """Equalize all pairs in place, those with a layer in `skip` left alone; returns how many there were."""
    spared = set(map(id, skip))
    found = [pair for pair in pairs(network) if spared.isdisjoint(map(id, (pair.producer, *pair.readers)))]
    for pair in found:
        equalize_pair(pair)
    return len(found)


def equalize_pair(pair: Pair) -> None:
    """Make the ranges of the producer's channels and of the columns that read them equal, in place."""
    scale = scales(pair)
    shape = (-1, *[1] * (pair.producer.weight.ndim - 1))
    pair.producer.weight.data = (pair.producer.weight.double() / scale.reshape(shape)).to(pair.producer.weight.dtype)
    if getattr(pair.producer, "bias", None) is not None:
        pair.producer.bias.data = (pair.producer.bias.double() / scale).to(pair.producer.bias.dtype)
    columns = pair.expand(scale)
    for reader in pair.readers:
        wide = columns.reshape(1, -1, *[1] * (reader.weight.ndim - 2))
        reader.weight.data = (reader.weight.double() * wide).to(reader.weight.dtype)


def scales(pair: Pair) -> Tensor:
    """s = sqrt(r1 / r2), double [C]; 1 for channels that are 0 on either side. r: the largest magnitudes."""
    first = pair.producer.weight.double().abs().reshape(len(pair.producer.weight), -1).amax(1)
    columns = [reader.weight.double().abs().transpose(0, 1).flatten(1).amax(1) for reader in pair.readers]
    second = pair.gather(torch.stack(columns).amax(0))
    usable = (first > 0) & (second > 0)
    return torch.where(usable, first / second.clamp(min=1e-300), 1.0).sqrt()


def pairs(network: nn.Module) -> Iterator[Pair]:
    """All function-preserving pairs below `network`."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            yield from sequential_pairs(module)
        elif isinstance(module, Attention):
            yield from attention_pairs(module)
        elif hasattr(module, "self_attn") and hasattr(module, "mlp") and hasattr(module, "input_layernorm"):
            yield from decoder_pairs(module)


def sequential_pairs(chain: nn.Sequential) -> Iterator[Pair]:
    """conv -> ReLU -> conv (or linear): ReLU(s x) = s ReLU(x) for s > 0."""
    for first, between, second in zip(chain, list(chain)[1:], list(chain)[2:], strict=False):
        kinds = isinstance(first, PRODUCERS) and isinstance(second, PRODUCERS) and isinstance(between, nn.ReLU)
        if kinds and getattr(second, "groups", 1) == 1 and len(first.weight) == second.weight.shape[1]:
            yield Pair(first, [second])


def attention_pairs(attn: Attention) -> Iterator[Pair]:
    """Of diffusers' attention: group norm -> q, k, v where all three read it, v -> the output projection."""
    plain = attn.add_k_proj is None and attn.to_out is not None and isinstance(attn.to_out[0], nn.Linear)
    if not plain or attn.fused_projections:
        return
    if attn.group_norm is not None and attn.group_norm.affine and not attn.is_cross_attention:
        yield Pair(attn.group_norm, [attn.to_q, attn.to_k, attn.to_v])
    if attn.inner_kv_dim == attn.inner_dim:
        yield Pair(attn.to_v, [attn.to_out[0]])


def decoder_pairs(block: nn.Module) -> Iterator[Pair]:
    """Of a Llama or Qwen2 decoder layer."""
    attn, mlp = block.self_attn, block.mlp
    yield Pair(block.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj])
    yield Pair(attn.v_proj, [attn.o_proj], attn.head_dim, attn.o_proj.in_features // attn.v_proj.out_features)
    yield Pair(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    yield Pair(mlp.up_proj, [mlp.down_proj])
