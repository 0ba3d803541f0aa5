"""LLaDA's and Dream's samplers, against plain loops that follow the releases row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dqbench.errors import UserError
from dqbench.text.schedulers import DreamScheduler, LLaDAScheduler, keep_likely

B, G, V = 3, 12, 9
MASK, EOS, EOT = 8, 0, 1
Predict = Callable[[Tensor], Tensor]


def predictor(seed: int = 0, masks: bool = False) -> Predict:
    """A network by lookup: logits [B, G, V] that depend on position and on all tokens; masks: the mask token wins."""
    generator = torch.Generator().manual_seed(seed)
    table, mix = torch.randn(G, V, V, generator=generator), torch.randn(G, G, generator=generator)

    def predict(x: Tensor) -> Tensor:
        tokens = torch.nn.functional.one_hot(x, V).float()
        logits = torch.einsum("bgv,gvw->bgw", torch.einsum("gh,bhv->bgv", mix, tokens), table)
        logits[..., MASK] = 50.0 if masks else -50.0
        return logits

    return predict


def sample(scheduler: LLaDAScheduler | DreamScheduler, predict: Predict, steps: int, seed: int = 0) -> list[Tensor]:
    """The tokens [B, G] before the first step and after each one."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]
    states = [torch.full((B, G), MASK)]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        states.append(scheduler.step(predict(states[-1]), t, states[-1], generator=generators).prev_sample)
    return states


def llada_release(predict: Predict, steps: int, block_length: int) -> Tensor:
    """The release's loop at temperature 0, low-confidence remasking."""
    x = torch.full((B, G), MASK)
    per_block = steps // (G // block_length)
    for start in range(0, G, block_length):
        for i in range(per_block):
            logits = predict(x)
            p, guess = logits.double().softmax(-1), logits.argmax(-1)
            for row in range(B):
                free = [g for g in range(start + block_length) if x[row, g] == MASK]
                free.sort(key=lambda g: -p[row, g, guess[row, g]])  # noqa: B023
                for g in free[: block_length // per_block + (i < block_length % per_block)]:
                    x[row, g] = guess[row, g]
    return x


def dream_release(predict: Predict, steps: int, confidence: Callable[[Tensor], Tensor], eps: float = 1e-3) -> Tensor:
    """The release's loop at temperature 0, one row at a time."""
    rows, times = [], torch.linspace(1, eps, steps + 1)
    for row in range(B):
        x = torch.full((B, G), MASK)
        for i in range(steps):
            masked = x[row] == MASK
            logits = predict(x)[row, masked]
            ratio = 1 - times[i + 1] / times[i]
            count = int(masked.sum() * ratio) if i < steps - 1 else int(masked.sum())
            chosen = confidence(logits.softmax(-1)).topk(count).indices
            filled = torch.full((int(masked.sum()),), MASK)
            filled[chosen] = logits.argmax(-1)[chosen]
            x[row, masked] = filled
        rows.append(x[row])
    return torch.stack(rows)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("block_length, steps", [(12, 12), (12, 5), (4, 9), (6, 2), (3, 16)])
def test_llada_fills_every_token_once_and_block_by_block(remasking, temperature, block_length, steps) -> None:
    """Also where the network predicts the mask token everywhere; per step floor(m / s), one more for the first."""
    scheduler = LLaDAScheduler(G, block_length, remasking, temperature, mask_token_id=MASK)
    states = sample(scheduler, predictor(masks=True), steps)
    per_block = steps // (G // block_length)
    done = 0
    for i, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
        base, extra = divmod(block_length, per_block)
        done += base + (i % per_block < extra)
        assert ((after != MASK).sum(1) == done).all()
        assert (after[before != MASK] == before[before != MASK]).all()
        assert (after[:, (i // per_block + 1) * block_length :] == MASK).all()
    assert (states[-1] != MASK).all()


@pytest.mark.parametrize("block_length, steps", [(12, 12), (12, 5), (4, 9), (6, 2)])
def test_llada_gives_the_tokens_of_the_release(block_length: int, steps: int) -> None:
    predict = predictor(1)
    found = sample(LLaDAScheduler(G, block_length, mask_token_id=MASK), predict, steps)[-1]
    assert torch.equal(found, llada_release(predict, steps, block_length))


def test_one_block_is_pure_diffusion() -> None:
    whole, none = (LLaDAScheduler(G, length, temperature=1.0, mask_token_id=MASK) for length in (G, None))
    assert torch.equal(sample(whole, predictor(), 4)[-1], sample(none, predictor(), 4)[-1])


@pytest.mark.parametrize(
    "alg, confidence",
    [
        ("maskgit_plus", lambda p: p.amax(-1)),
        ("topk_margin", lambda p: p.sort(-1).values[:, -1] - p.sort(-1).values[:, -2]),
        ("entropy", lambda p: (p * torch.log(p + 1e-10)).sum(-1)),
    ],
)
@pytest.mark.parametrize("steps", [3, 12, 20])
def test_dream_gives_the_tokens_of_the_release(alg: str, confidence: Callable, steps: int) -> None:
    predict = predictor(2)
    states = sample(DreamScheduler(G, alg, mask_token_id=MASK), predict, steps)
    assert torch.equal(states[-1], dream_release(predict, steps, confidence))
    assert (states[-1] != MASK).all()


@pytest.mark.parametrize("alg, chosen", [("maskgit_plus", 0), ("topk_margin", 1), ("entropy", 2)])
def test_dreams_confidences_choose_differently(alg: str, chosen: int) -> None:
    """Most probable; furthest ahead of the second; of least entropy."""
    p = torch.full((3, 13), 1e-9)
    p[0, :3], p[1, :12], p[2, :3] = torch.tensor([0.5, 0.45, 0.05]), 0.05, torch.tensor([0.49, 0.49, 0.02])
    p[1, 0] = 0.45
    scheduler = DreamScheduler(3, alg, mask_token_id=12)
    scheduler.set_timesteps(2)
    assert scheduler.step(p.log()[None], 1, torch.full((1, 3), 12)).committed[0].nonzero().tolist() == [[chosen]]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}, {"alg": "entropy", "alg_temp": 0.5}])
def test_dream_never_fills_in_the_mask(options: dict) -> None:
    states = sample(DreamScheduler(G, mask_token_id=MASK, **options), predictor(masks=True), 4)
    assert (states[-1] != MASK).all()


def test_origin_fills_in_each_token_with_the_probability_of_the_step() -> None:
    scheduler = DreamScheduler(4000, "origin", mask_token_id=MASK)
    scheduler.set_timesteps(4)
    x, p = torch.full((1, 4000), MASK), 1 - scheduler.times[2] / scheduler.times[1]
    out = scheduler.step(torch.zeros(1, 4000, V), 2, x, generator=[torch.Generator().manual_seed(0)])
    assert out.committed.float().mean().item() == pytest.approx(float(p), abs=0.03)


@pytest.mark.parametrize("scheduler", [LLaDAScheduler, DreamScheduler])
def test_temperature_draws_from_the_softmax(scheduler: type) -> None:
    size, temperature = 20_000, 0.5
    logits = torch.tensor([0.0, 1.0, -1.0, 3.0])
    made = scheduler(size, temperature=temperature, mask_token_id=3)
    made.set_timesteps(1)
    x = torch.full((1, size), 3)
    drawn = made.step(logits.expand(1, size, 4), 0, x, generator=[torch.Generator().manual_seed(1)]).prev_sample
    shares = drawn.flatten().bincount(minlength=4) / size
    assert torch.allclose(shares[:3], (logits[:3] / temperature).softmax(0), atol=0.015) and shares[3] == 0


def test_alg_temp_draws_which_tokens_by_their_confidence() -> None:
    """Of 3 tokens 1 is filled in: drawn with probability softmax(confidence / alg_temp)."""
    logits = torch.tensor([[0.0, 0.0, -50.0], [2.0, 0.0, -50.0], [4.0, 0.0, -50.0]])
    scheduler = DreamScheduler(3, "maskgit_plus", alg_temp=0.3, mask_token_id=2)
    scheduler.set_timesteps(2)
    rows = 4000
    generators = [torch.Generator().manual_seed(i) for i in range(rows)]
    out = scheduler.step(logits.expand(rows, 3, 3), 1, torch.full((rows, 3), 2), generator=generators)
    expected = (logits.softmax(-1).amax(-1) / 0.3).softmax(0)
    assert (out.committed.sum(1) == 1).all()
    assert torch.allclose(out.committed.float().mean(0), expected, atol=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_end_is_filled_in_last_or_never(temperature: float) -> None:
    tokens = {"mask_token_id": MASK, "eos_token_id": EOS, "eot_token_id": EOT}
    logits = torch.zeros(B, G, V)
    logits[:, ::2, EOS] = 60.0
    logits[:, 1::2, 5] = 20.0
    scheduler = LLaDAScheduler(G, temperature=temperature, confidence_eos_eot_inf=True, **tokens)
    last = sample(scheduler, lambda x: logits, 2)
    assert (last[1][:, 1::2] != MASK).all() and (last[1][:, ::2] == MASK).all() and (last[2][:, ::2] == EOS).all()
    plain = sample(LLaDAScheduler(G, temperature=temperature, **tokens), lambda x: logits, 2)
    assert (plain[1][:, ::2] == EOS).all()
    never = sample(LLaDAScheduler(G, temperature=temperature, logits_eos_inf=True, **tokens), lambda x: logits, 2)
    assert not (never[-1] == EOS).any()


def test_a_sample_depends_on_its_own_generator_alone() -> None:
    def last_row(rows: int) -> Tensor:
        scheduler = LLaDAScheduler(G, 6, "random", 1.0, mask_token_id=MASK)
        scheduler.set_timesteps(4)
        x, generators = torch.full((rows, G), MASK), [torch.Generator().manual_seed(9 - i) for i in range(rows)][::-1]
        for t in scheduler.timesteps:
            x = scheduler.step(predictor()(x), t, x, generator=generators).prev_sample
        return x[-1]

    assert torch.equal(last_row(1), last_row(3))


@pytest.mark.parametrize("seed", range(3))
def test_filters_are_those_of_transformers(seed: int) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(keep_likely(logits, 0.8, None), TopPLogitsWarper(0.8)(None, logits))
    assert torch.equal(keep_likely(logits, None, 7), TopKLogitsWarper(7)(None, logits))


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: LLaDAScheduler(10, 4), "gen_length=10 must be a multiple of block_length=4"),
        (lambda: LLaDAScheduler(8, 2).set_timesteps(6), "steps=6 must be a multiple of the number of blocks, 4"),
        (lambda: LLaDAScheduler(8).set_timesteps(0), "steps=0"),
        (lambda: LLaDAScheduler(8, remasking="lowest"), "remasking=lowest is unknown; allowed: low_confidence, random"),
        (lambda: DreamScheduler(8, alg="best"), "alg=best is unknown; allowed: origin, maskgit_plus"),
        (lambda: DreamScheduler(0), "gen_length=0"),
        (lambda: DreamScheduler(8, eps=1.0), "eps=1.0"),
        (lambda: sample(LLaDAScheduler(G), predictor(), 1), "mask_token_id"),
        (lambda: sample(LLaDAScheduler(G, logits_eos_inf=True, mask_token_id=MASK), predictor(), 1), "eos_token_id"),
    ],
)
def test_bad_settings_are_one_line(make: Callable, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)
