"""The text miniature: its loss, its training script, and that what is shipped is what was measured."""

from __future__ import annotations

import json
import platform
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dqbench.text.networks import BidirectionalLlama
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler
from dqbench.text.tasks import rows
from dqbench.zoo import train
from dqbench.zoo.text import solve
from dqbench.zoo.text_card import share, text_card

SHIPPED = train.ZOO / "text_mdlm"
PROMPT, MASK, EOS = 12, 2, 1


class Unconditional(nn.Module):
    """A network that has seen nothing but <eos>, whatever it is asked: logits 3 for it, 0 for the other 99 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(3.0 * nn.functional.one_hot(torch.tensor(EOS), 100))
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def small_settings() -> train.Settings:
    settings = train.load_settings("text_mdlm")
    settings.iterations, settings.batch_size, settings.checkpoint_every = 3, 20, 2
    settings.task["network"] |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings.task["network"] |= {"num_key_value_heads": 2, "intermediate_size": 16}
    settings.task["compile"] = False
    settings.task["pool"] = settings.task["evaluated"] = dict.fromkeys(("add", "sort", "copy", "brackets"), 8)
    return settings


def test_loss_is_unbiased_and_counts_end_of_text():
    """For logits that do not look at the context it is the mean cross-entropy of all tokens after the prompt."""
    task, network = small_settings().build_task(), Unconditional()
    ids = task.questions["sort"].repeat(1000, 1)
    answers = ids[:, PROMPT:].flatten()
    expected = nn.functional.cross_entropy(network.logits.expand(len(answers), -1), answers)
    task.min_probability = 0.05  # a weight of 20 at most: little variance
    found = task._loss_on(network, ids, PROMPT, torch.Generator().manual_seed(0))
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_loss_masks_answers_and_english_but_no_prompt():
    task, network = small_settings().build_task(), Unconditional()
    task.loss(network, 160, torch.Generator().manual_seed(0)).backward()
    questions, english = network.seen
    assert questions.shape == (144, 20) and english.shape == (16, 64) and network.logits.grad.abs().sum() > 0
    assert not (questions[:, :PROMPT] == MASK).any()
    for hidden in (questions[:, PROMPT:] == MASK, english == MASK):
        assert 0.4 < hidden.float().mean() < 0.6


def test_masking_probabilities_are_stratified():
    task = small_settings().build_task()
    p = task._probability(50, torch.Generator().manual_seed(0))
    t = (p - task.min_probability) / (1 - task.min_probability)
    assert (t.sort().values * 50).floor().tolist() == list(range(50)) and t.tolist() != t.sort().values.tolist()


def test_training_writes_a_pipeline_and_its_card(tmp_path):
    report = train.train(small_settings(), tmp_path, "cpu")
    pipe = MaskedDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.model, BidirectionalLlama) and pipe.model.dtype == torch.float16
    assert report["python"] == platform.python_version() and 0 <= report["exact_add"] <= 1
    assert 5 < report["bits_per_character"] < 9  # an untrained network knows no more than log2(100)
    card = text_card(tmp_path, 8)
    assert "{" not in card.split("| task |")[0] and card.count("of 8 |") == 12


def test_share_has_wilsons_interval():
    assert share(torch.arange(100) < 90) == "90.0% [82.6, 94.5] of 100"


def test_shipped_pipeline_is_small_and_complete():
    with safe_open(SHIPPED / "model" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.safetensors")) <= 5_000_000
    for dtype in (torch.float16, torch.float32):
        pipe = MaskedDiffusionPipeline.from_pretrained(SHIPPED, dtype=dtype)
        assert pipe.model.dtype == dtype and isinstance(pipe.scheduler, LLaDAScheduler)
        assert sum(p.numel() for p in pipe.model.parameters()) == 2_281_728
        assert {part.mask_token_id for part in (pipe.tokenizer, pipe.model.config, pipe.scheduler.config)} == {MASK}
    assert pipe(["      27+58=", "   sort 312="], num_inference_steps=8).texts == ["85", "123"]


@pytest.mark.slow
def test_shipped_weights_are_the_ones_that_were_measured():
    pipe = MaskedDiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    recorded, card = json.loads((SHIPPED / "training.json").read_text()), (SHIPPED / "README.md").read_text()
    found = train.load_settings("text_mdlm").build_task().evaluate(pipe.model)
    bits = found.pop("bits_per_character")  # another Python has other documentation
    same_text = recorded["python"].split(".")[:2] == platform.python_version().split(".")[:2]
    assert bits == pytest.approx(recorded["bits_per_character"], rel=0.02 if same_text else 0.2)
    assert found == pytest.approx({key: recorded[key] for key in found}, abs=0.011)
    assert recorded["exact_add"] >= 0.9 and f"{recorded['exact_add']:.1%} [" in card


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_do_not_depend_on_the_batch(batch):
    pipe = MaskedDiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts, _ = rows("brackets", "held_out", 6, seed=1)
    pieces = [prompts[i : i + batch] for i in range(0, 6, batch)]
    texts = [text for piece in pieces for text in pipe(piece, num_inference_steps=8).texts]
    assert texts == pipe(prompts, num_inference_steps=8).texts
    assert solve(pipe, "brackets", "held_out", 6).sum() >= 4
