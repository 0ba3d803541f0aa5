"""The Monte-Carlo bound against its expectation by enumeration; agreement; the harness's adapter on a stub of it."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from transformers import LlamaConfig

from dqbench.errors import UserError
from dqbench.metrics.base import mean_interval
from dqbench.text import lm_eval as adapter
from dqbench.text.agreement import agreement, predictions
from dqbench.text.likelihood import bin_masks, count_masks, nll_bound, per_token, rate_masks
from dqbench.text.networks import BidirectionalLlama
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler
from dqbench.text.tokenizer import character_tokenizer

V, MASK = 7, 6


class Network(nn.Module):
    """Logits [B, L, V] that depend on every token: a random table, mixed over positions."""

    def __init__(self, length: int, seed: int = 0, vocabulary: int = V, mask: int = MASK, **config: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(mask_token_id=mask, **config)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.mix = nn.Parameter(torch.randn(length, length, generator=generator))

    def forward(self, input_ids: Tensor) -> Any:
        length = input_ids.shape[1]
        return SimpleNamespace(logits=torch.einsum("gh,bhv->bgv", self.mix[:length, :length], self.table[input_ids]))


def rows(count: int, length: int) -> Tensor:
    return torch.randint(0, MASK, (count, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def losses(network: Network, row: Tensor, places: list[int]) -> dict[tuple[int, ...], float]:
    """The summed cross-entropy of every set of masked places."""
    found = {}
    for size in range(1, len(places) + 1):
        for masked in map(list, itertools.combinations(places, size)):
            noisy = row.clone()
            noisy[masked] = MASK
            log_p = network(noisy[None]).logits[0].log_softmax(-1)
            found[tuple(masked)] = -sum(float(log_p[i, row[i]]) for i in masked)
    return found


@pytest.mark.parametrize("length, prompt, draws", [(1, 2, 3), (3, 0, 2), (4, 1, 7), (6, 2, 4)])
def test_counted_masks_are_unbiased(length: int, prompt: int, draws: int) -> None:
    """E over l uniform and subsets of size l of (T / l) CE, by enumeration; D need not divide T."""
    network, row = Network(prompt + length), rows(1, prompt + length)
    every = losses(network, row[0], list(range(prompt, prompt + length)))
    sizes = [[loss for masked, loss in every.items() if len(masked) == size] for size in range(1, length + 1)]
    expected = sum(length / (i + 1) * np.mean(found) for i, found in enumerate(sizes)) / length
    copies = 3000
    masks = count_masks((torch.arange(prompt + length) >= prompt).expand(copies, -1), draws, seed=0)
    assert not masks.masked[..., :prompt].any()
    values = nll_bound(network, row.expand(copies, -1), masks, batch_size=4096).mean(1).numpy()
    assert abs(values.mean() - expected) < 4 * values.std() / copies**0.5 + 1e-6


def test_rated_masks_are_unbiased() -> None:
    """The integral over p of E[CE] / p, p uniform on (eps, 1), by enumeration and quadrature."""
    length, eps, copies = 4, 0.05, 4000
    network, row = Network(length), rows(1, length)
    every = losses(network, row[0], list(range(length)))

    def integrand(p: float) -> float:
        return sum(p ** len(m) * (1 - p) ** (length - len(m)) * loss for m, loss in every.items()) / p

    expected = quad(integrand, eps, 1)[0] / (1 - eps)
    masks = rate_masks(torch.ones(copies, length, dtype=torch.bool), 4, seed=0, eps=eps)
    values = nll_bound(network, row.expand(copies, -1), masks, batch_size=4096).mean(1).numpy()
    assert abs(values.mean() - expected) < 4 * values.std() / copies**0.5
    assert values.std() > 0


@pytest.mark.parametrize("length, draws", [(6, 6), (6, 12), (5, 8), (8, 3)])
def test_counts_are_stratified(length: int, draws: int) -> None:
    """Within a row every l comes up as evenly as D allows, and over rows each draw takes every l."""
    counts = count_masks(torch.ones(400, length, dtype=torch.bool), draws, seed=1).masked.sum(-1)
    assert counts.min() == 1 and counts.max() == length
    for row in counts:
        shares = row.bincount(minlength=length + 1)[1:]
        assert shares.max() - shares.min() <= 1
    assert (counts[:, 0].bincount(minlength=length + 1)[1:] > 400 / length / 2).all()


def test_rates_are_stratified() -> None:
    weight = rate_masks(torch.ones(20, 3, dtype=torch.bool), 8, seed=1).weight
    assert ((1 / weight).sort(1).values.diff(dim=1) - 0.999 / 8).abs().max() < 1e-9


@pytest.mark.parametrize("make", [count_masks, rate_masks])
def test_masks_come_from_seed_and_row_alone(make: Any) -> None:
    target = torch.ones(5, 9, dtype=torch.bool)
    first, again, few, other = make(target, 4, 0), make(target, 4, 0), make(target[:2], 4, 0), make(target, 4, 1)
    assert torch.equal(first.masked, again.masked) and torch.equal(first.masked[:2], few.masked)
    assert not torch.equal(first.masked, other.masked) and not torch.equal(first.masked[0], first.masked[1])


def test_paired_differences() -> None:
    """A network against its copy: exactly 0 for each draw; against a near one: the same masks, a tight interval."""
    network, ids = Network(10), rows(40, 10)
    masks = count_masks(torch.ones_like(ids, dtype=torch.bool), 8, seed=0)
    values, same = nll_bound(network, ids, masks), nll_bound(copy.deepcopy(network), ids, masks)
    assert torch.equal(values - same, torch.zeros(40, 8, dtype=torch.float64))
    close = copy.deepcopy(network)
    close.table.data += 0.01 * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    paired = mean_interval((nll_bound(close, ids, masks) - values).mean(1).numpy())[1]
    assert paired < 0.1 * mean_interval(values.mean(1).numpy())[1]


def test_values_do_not_depend_on_the_batch() -> None:
    network, ids = Network(6), rows(5, 6)
    masks = count_masks(torch.ones_like(ids, dtype=torch.bool), 3, seed=0)
    torch.testing.assert_close(nll_bound(network, ids, masks, batch_size=4), nll_bound(network, ids, masks))


def test_a_shifted_network_is_read_one_to_the_right() -> None:
    shifted, plain, ids = Network(5, shift_logits=True), Network(5), rows(3, 5)
    target = (torch.arange(5) >= 1).expand(3, 5)
    masks = count_masks(target, 4, seed=0)
    moved = copy.deepcopy(plain)
    moved.mix.data = torch.cat([plain.mix[:1], plain.mix[:-1]])
    torch.testing.assert_close(nll_bound(shifted, ids, masks), nll_bound(moved, ids, masks))


def test_bits_per_token_of_a_uniform_network() -> None:
    network, ids = Network(6), rows(2, 6)
    network.table.data.zero_()
    target = (torch.arange(6) >= torch.tensor([[1], [4]])).expand(2, 6)
    values = nll_bound(network, ids, count_masks(target, 5, seed=0))
    torch.testing.assert_close(values.mean(1), torch.tensor([5.0, 2.0]).double() * math.log(V))
    torch.testing.assert_close(per_token(values, target), torch.full((2,), math.log2(V)).double())
    with pytest.raises(UserError, match="row 1 has no target token"):
        count_masks(torch.tensor([[True], [False]]), 2, seed=0)


def test_bins_hold_their_share_of_masked_tokens() -> None:
    target = (torch.arange(14) >= 2).expand(30, 14)
    masks = bin_masks(target, bins=4, draws=5, seed=0)
    counts = masks.masked.sum(-1).view(30, 4, 5)
    for i in range(4):
        assert counts[:, i].min() == 3 * i + 1 and counts[:, i].max() == 3 * i + 3
    assert not masks.masked[..., :2].any()


def test_agreement_of_a_network_with_itself_and_with_another() -> None:
    """KL by hand for a network whose predictions ignore the input; short rows have no value where no count fits."""
    ids, bins = rows(6, 8), 4
    target = (torch.arange(8) >= torch.tensor([0, 0, 0, 0, 0, 6])[:, None]).expand(6, 8)
    masks = bin_masks(target, bins, 3, seed=0)
    teacher, student = Network(8), Network(8, seed=1)
    itself = agreement(predictions(teacher, ids, masks), copy.deepcopy(teacher), ids, masks, bins)
    short = torch.tensor([True, False, True, False])
    assert torch.equal(itself.same[5].isnan(), short) and not itself.same[:5].isnan().any()
    assert (itself.same[:5] == 1).all() and (itself.kl[:5] == 0).all()
    other = agreement(predictions(teacher, ids, masks), student, ids, masks, bins)
    assert (other.kl[:5] > 0).all() and other.same[:5].mean() < 0.7
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    fixed = [Network(8, vocabulary=3, mask=2) for _ in range(2)]
    for network, logits in zip(fixed, (p.log(), q.log()), strict=True):
        network.table.data, network.mix.data = logits.expand(3, 3).clone(), torch.eye(8)
    found = agreement(predictions(fixed[0], ids % 2, masks), fixed[1], ids % 2, masks, bins)
    assert torch.allclose(found.kl[:5].float(), (p * (p / q).log()).sum().expand(5, bins))
    assert (found.same[:5] == 0).all()


@dataclass
class Request:
    """As the harness makes them."""

    args: tuple
    task_name: str = "lambada"
    doc_id: int = 0
    idx: int = 0


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stub of the harness: its base class, and an entry point that says what it was called with."""

    class LM:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval"].simple_evaluate = lambda **settings: settings
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["lm_eval.api.model"]


def language_model(harness: ModuleType, temperature: float = 0.0, **changes: Any) -> Any:
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    network = BidirectionalLlama(LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5,
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id,
    ))  # fmt: skip
    pipe = MaskedDiffusionPipeline(network.eval(), LLaDAScheduler(6, temperature=temperature), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    settings = {"draws": 8, "batch_size": 2, "max_length": 20, "check_greedy": True, "steps": 3, "guidance": 0.0}
    return adapter.harness_model(pipe, adapter.Protocol(**{**settings, "seed": 0, **changes}))


def test_loglikelihoods_of_the_adapter(harness: ModuleType) -> None:
    """The bound on a continuation given its context, spaces at the seam included; greedy where decoding gives it."""
    model = language_model(harness)
    assert isinstance(model, harness.LM)
    (value, greedy), (spaced, _) = model.loglikelihood([Request(("2+2=", " 4")), Request(("2+2= ", "4"))])
    ids, target = model._tokens("2+2= 4"), torch.arange(6)[None] >= 4
    expected = -nll_bound(model.pipe.model, torch.tensor([ids]), count_masks(target, 8, 0), batch_size=2).mean()
    assert value == spaced == pytest.approx(float(expected)) and not greedy
    best = model.pipe([model._tokens("ab:")], num_inference_steps=6).texts[0]
    assert len(best) == 6
    assert model.loglikelihood([Request(("ab:", best))])[0][1] is True
    assert language_model(harness, check_greedy=False).loglikelihood([Request(("ab:", best))])[0][1] is False
    (_, asked), *offered = language_model(harness, check_greedy=None).loglikelihood(
        [Request(("ab:", best)), Request(("ab:", best), "piqa"), Request(("ab:", "4"), "piqa", idx=1)]
    )
    assert asked is True and [greedy for _, greedy in offered] == [False, False]  # a choice is by likelihood
    single, _ = model.loglikelihood([Request(("2+2=", "4"))])[0]
    one, _ = language_model(harness, draws=1).loglikelihood([Request(("2+2=", "4"))])[0]
    assert single == one  # all draws of a single token are one
    long = model.loglikelihood([Request(("x" * 60 + "2+2=", " 4"))])[0][0]
    assert long == model.loglikelihood([Request(("x" * 14 + "2+2=", " 4"))])[0][0]
    (rolling,) = model.loglikelihood_rolling([Request(("a" * 25,))])
    assert rolling == pytest.approx(sum(model._score([], model._tokens("a" * length)) for length in (20, 5)))


def test_texts_of_the_adapter(harness: ModuleType) -> None:
    """Cut off before the first stop text; not dependent on which requests share a batch."""
    model = language_model(harness, temperature=1.0)
    requests = [Request((text, {"until": []})) for text in ("ab:", "c", "1+1=")]
    texts = model.generate_until(requests)
    assert texts == language_model(harness, temperature=1.0, batch_size=1).generate_until(requests)
    stop = texts[0][2]
    assert model.generate_until([Request(("ab:", {"until": stop}))]) == [texts[0].split(stop)[0]]
    assert adapter.cut("one\ntwo", {"until": ["", "w", "\n"]}) == "one"
    with pytest.raises(UserError, match="a continuation has 21 tokens; allowed: 1 to 20"):
        model.loglikelihood([Request(("a", "b" * 21))])
    given = adapter.evaluate(model.pipe, model.protocol, ("piqa",), limit=2)
    assert given["tasks"] == ["piqa"] and given["limit"] == 2 and isinstance(given["model"], harness.LM)


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'dqbench\[eval\]'"):
        adapter.harness_model(None, None)
