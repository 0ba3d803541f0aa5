"""The pipeline of masked-diffusion language models, on a tiny random network over characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, Model
from dqbench.errors import UserError
from dqbench.methods.rtn import RTN
from dqbench.metrics.guards import DegenerateSamples
from dqbench.models import attach_anatomy, clone, denoiser
from dqbench.quant.quantizers import ActRule, WeightRule
from dqbench.text.networks import BidirectionalLlama, BidirectionalQwen2, bidirectional, token_logits
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import DreamScheduler, LLaDAScheduler
from dqbench.text.tokenizer import character_tokenizer

GEN, STEPS = 8, 4
PROMPTS = ["12+34=", "a", "sort cab:"]


def network(seed: int = 0, kind: type = BidirectionalLlama, **options: object) -> BidirectionalLlama:
    tokenizer = character_tokenizer()
    config = {BidirectionalLlama: LlamaConfig, BidirectionalQwen2: Qwen2Config}[kind](
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, max_position_embeddings=64, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


def pipeline(scheduler: object = None, **options: object) -> MaskedDiffusionPipeline:
    scheduler = scheduler or LLaDAScheduler(GEN, temperature=1.0)
    pipe = MaskedDiffusionPipeline(network(**options), scheduler, character_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def anatomy() -> Model:
    return Model(
        name="tiny", path="", version=0, pipeline="dqbench.text.pipeline.MaskedDiffusionPipeline", denoiser="model",
        dtype="float32", data=None, prompts=None, num_classes=None, units=["model.layers.*"], official_order=[],
        shortcuts=[], time_embedding=[], architecture={}, inputs={},
    )  # fmt: skip


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("scheduler", [LLaDAScheduler, DreamScheduler])
def test_a_sample_depends_on_its_prompt_and_generator_alone(scheduler: type, guidance: float) -> None:
    pipe = pipeline(scheduler(GEN, temperature=1.0))
    together = pipe(PROMPTS, seeds(0, 1, 2), STEPS, guidance)
    for i, prompt in enumerate(PROMPTS):
        alone = pipe([prompt], seeds(i), STEPS, guidance)
        assert torch.equal(alone.generated[0], together.generated[i])
        assert alone.texts[0] == together.texts[i]
    assert not (together.generated == pipe.tokenizer.mask_token_id).any()
    assert len(set(together.texts)) == 3


def test_output_holds_padding_prompt_and_text() -> None:
    pipe = pipeline()
    out = pipe(PROMPTS, seeds(0, 1, 2), STEPS)
    assert out.sequences.shape == (3, 9 + GEN) and torch.equal(out.sequences[:, 9:], out.generated)
    assert out.sequences[1, :9].tolist() == [0] * 8 + pipe.tokenizer(["a"])["input_ids"][0]
    ids = pipe([pipe.tokenizer([text])["input_ids"][0] for text in PROMPTS], seeds(0, 1, 2), STEPS, output_type="np")
    assert (ids.sequences == out.sequences.numpy()).all() and ids.texts is None


def test_texts_end_before_the_first_end_of_text() -> None:
    pipe = pipeline()
    ids = pipe.tokenizer(["ab<eos>cd<eos>"])["input_ids"]
    assert ids[0][2] == pipe.tokenizer.eos_token_id and pipe._decode(torch.tensor(ids)) == ["ab"]


def test_every_position_attends_to_every_other() -> None:
    ids = torch.randint(4, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = 4 if ids[0, -1] != 4 else 5
    assert not torch.allclose(network()(ids).logits[0, 0], network()(other).logits[0, 0])


def test_padding_changes_nothing() -> None:
    ids = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((2, 3), 7), ids], dim=1)
    tokens = (torch.arange(9) >= 3).long().expand(2, 9)
    torch.testing.assert_close(network()(padded, tokens).logits[:, 3:], network()(ids).logits, rtol=1e-5, atol=1e-5)
    assert bidirectional(padded, tokens, torch.float32)["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]


def test_shifted_networks_predict_the_next_token() -> None:
    ids = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    plain, shifted = network(kind=BidirectionalQwen2), network(kind=BidirectionalQwen2, shift_logits=True)
    logits = plain(ids).logits
    assert torch.equal(token_logits(plain, ids), logits)
    assert torch.equal(token_logits(shifted, ids), torch.cat([logits[:, :1], logits[:, :-1]], dim=1))


class Spy(LLaDAScheduler):
    """Keeps what it is given."""

    def step(self, model_output: Tensor, *args: object, **kwargs: object) -> object:
        self.seen = model_output
        return super().step(model_output, *args, **kwargs)


def test_guidance_moves_away_from_the_network_without_prompt() -> None:
    """un + (w + 1) (l - un), both in one batch; padding stays padding."""
    pipe, calls = pipeline(Spy(GEN)), []
    pipe.model.register_forward_hook(lambda module, args, kwargs, out: calls.append(kwargs), with_kwargs=True)
    out = pipe(["12", "a"], seeds(0, 1), 1, guidance_scale=0.5)
    assert [len(call["input_ids"]) for call in calls] == [4]
    mask, ids, tokens = 2, out.sequences.clone(), torch.ones(2, 2 + GEN, dtype=torch.long)
    ids[:, 2:], tokens[1, 0] = mask, 0
    prompted, free = (pipe.model(x, tokens).logits[:, 2:] for x in (ids, torch.full_like(ids, mask)))
    torch.testing.assert_close(pipe.scheduler.seen, free + 1.5 * (prompted - free), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("scheduler", [LLaDAScheduler(GEN, 4), DreamScheduler(GEN, "entropy", temperature=0.5)])
def test_saving_and_loading(tmp_path: Path, scheduler: object, with_tokenizer: bool) -> None:
    pipe = pipeline(scheduler, kind=BidirectionalQwen2, shift_logits=True)
    if not with_tokenizer:
        pipe.register_modules(tokenizer=None)
    pipe.save_pretrained(tmp_path)
    loaded = MaskedDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    loaded.to("cpu").set_progress_bar_config(disable=True)
    assert type(loaded.model) is BidirectionalQwen2 and type(loaded.scheduler) is type(scheduler)
    assert loaded.scheduler.config.mask_token_id == loaded.model.config.mask_token_id == 2
    prompt = [[5, 6, 7], [8]]
    before, after = (one(prompt, seeds(0, 1), STEPS, output_type="pt") for one in (pipe, loaded))
    assert torch.equal(before.sequences, after.sequences)


def test_clone_has_a_network_of_its_own() -> None:
    pipe = pipeline()
    attach_anatomy(pipe, anatomy())
    twin = clone(pipe)
    denoiser(twin).lm_head.weight.zero_()
    assert denoiser(pipe) is pipe.model and pipe.model.lm_head.weight.any()
    assert twin(["a"], seeds(0), STEPS).texts != pipe(["a"], seeds(0), STEPS).texts


def test_a_quantized_network_plugs_into_the_pipeline_of_llada2() -> None:
    pipe = pipeline()
    attach_anatomy(pipe, anatomy())
    rows = torch.randint(4, 100, (8, 12), generator=torch.Generator().manual_seed(0)).numpy()
    weight = WeightRule("per_channel", None, "minmax", symmetric=False, official=False)
    act = ActRule("minmax", symmetric=False, over="all", momentum=0.0, through=True, official=False)
    rtn = RTN("rtn", 1, ["lm_head"], {}, weight, act, attention=False)
    quantized = rtn(pipe, CalibrationSet({"input_ids": rows}, np.zeros(8)), Bits(3, 8, 32, 32)).model
    assert not torch.equal(quantized.model.layers[0].mlp.up_proj.weight, pipe.model.model.layers[0].mlp.up_proj.weight)

    def generated(model: BidirectionalLlama) -> Tensor:
        llada2 = LLaDA2Pipeline(model, BlockRefinementScheduler(block_length=4), pipe.tokenizer)
        llada2.set_progress_bar_config(disable=True)
        settings = {"gen_length": GEN, "block_length": 4, "num_inference_steps": 2, "eos_early_stop": False}
        return llada2(input_ids=torch.from_numpy(rows[:2]), sampling_method="greedy", **settings).sequences

    assert generated(quantized).shape == (2, GEN)
    assert not torch.equal(generated(quantized), generated(pipe.model))


def test_numbers_that_are_not() -> None:
    pipe = pipeline()
    pipe.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(DegenerateSamples, match="NaN at timestep 3"):
        pipe(["a"], seeds(0), STEPS)


def test_bad_input_is_one_line() -> None:
    pipe = pipeline()
    for line, arguments in {
        "1 generators for 2 samples": (["a", "b"], seeds(0), STEPS),
        "no prompt": ([], [], STEPS),
        "output_type=list is unknown; allowed: text, pt, np": (["a"], seeds(0), STEPS, 0.0, "list"),
    }.items():
        with pytest.raises(UserError, match=line):
            pipe(*arguments)
    pipe.register_modules(tokenizer=None)
    with pytest.raises(UserError, match="no tokenizer"):
        pipe(["a"], seeds(0), STEPS)
    pipe.model.config.mask_token_id, pipe.scheduler = None, LLaDAScheduler(GEN)
    with pytest.raises(UserError, match="mask_token_id"):
        pipe([[5]], seeds(0), STEPS)
