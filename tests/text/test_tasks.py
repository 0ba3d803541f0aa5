"""The tokenizer's round trip, the rules of the tasks, and that nothing held out is trained on."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from dqbench.errors import UserError
from dqbench.text import tasks
from dqbench.text.tasks import TASKS, encode, english, english_rows, exact_match, rows, token_rows
from dqbench.text.tokenizer import ALPHABET, character_tokenizer

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
ADDITIONS = {"train": 7286, "held_out": 814}


def balanced(text: str) -> bool:
    stack = []
    for character in text:
        if character in PAIRS:
            stack.append(PAIRS[character])
        elif not stack or stack.pop() != character:
            return False
    return not stack


RULES = {
    "add": lambda question, answer: sum(map(int, question.split("+"))) == int(answer),
    "sort": lambda question, answer: "".join(sorted(question.removeprefix("sort "))) == answer,
    "copy": lambda question, answer: question == f"copy {answer}",
    "brackets": lambda question, answer: balanced(question + answer) and not set(answer) & set(PAIRS),
}


def test_every_character_is_a_token_and_survives_saving(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (character_tokenizer(), loaded):
        ids = tokenizer(ALPHABET + "  a  \n\n , ?").input_ids
        assert ids == [*range(4, 100), 5, 5, 70, 5, 5, 4, 4, 5, 17, 5, 36] and len(tokenizer) == 100
        assert tokenizer.decode(ids) == ALPHABET + "  a  \n\n , ?"
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
        assert tokenizer("é").input_ids == [3]


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_fit(task, split):
    prompts, answers = rows(task, split, 500, seed=0)
    assert len(set(prompts)) == 500 and {len(prompt) for prompt in prompts} == {12}
    assert all(1 <= len(answer) <= 7 for answer in answers)  # an <eos> at least
    assert all(RULES[task](prompt.strip(" ")[:-1], answer) for prompt, answer in zip(prompts, answers, strict=True))
    assert rows(task, split, 500, seed=0)[0] == prompts != rows(task, split, 500, seed=1)[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_tenth_is_held_out_and_never_trained_on(task):
    count = ADDITIONS if task == "add" else dict.fromkeys(ADDITIONS, 2000)
    train, held_out = (set(rows(task, split, count[split], seed=3)[0]) for split in tasks.SPLITS)
    assert not train & held_out
    keys = {tasks.question_key(prompt) for prompt, _ in islice(TASKS[task](random.Random(0)), 8100)}
    assert sum(map(tasks.is_held_out, keys)) / len(keys) == pytest.approx(0.1, abs=0.02)


def test_commuted_additions_are_on_the_same_side():
    held_out = {prompt.strip(" =") for prompt in rows("add", "held_out", ADDITIONS["held_out"], seed=0)[0]}
    assert held_out == {"+".join(reversed(prompt.split("+"))) for prompt in held_out}
    with pytest.raises(UserError, match="'add' has 814 held_out questions, 815 were asked for"):
        rows("add", "held_out", ADDITIONS["held_out"] + 1, seed=0)


def test_rows_do_not_depend_on_the_process():
    """Python's own hash() does."""
    code = "from dqbench.text.tasks import rows; print(rows('brackets', 'held_out', 3, 0))"
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert other.stdout.strip() == str(rows("brackets", "held_out", 3, 0))


def test_rows_are_prompt_answer_and_end_of_text():
    ids = encode(["      12+34=", "   sort 312="], ["46", "123"])
    text = character_tokenizer().batch_decode(ids)
    assert text == ["      12+34=46" + 6 * "<eos>", "   sort 312=123" + 5 * "<eos>"] and ids.shape == (2, 20)


def test_exact_match_forgives_nothing():
    assert exact_match(["46", "046", "46 ", ""], ["46"] * 4).tolist() == [True, False, False, False]


def test_no_held_out_paragraph_is_trained_on():
    train, held_out = (" ".join("\n".join(tasks.paragraphs(split)).split()) for split in tasks.SPLITS)
    pieces = [held_out[start : start + 64] for start in range(0, len(held_out) - 64, 64)]
    assert sum(piece in train for piece in pieces) / len(pieces) < 0.03  # 0.85 with the pages as they are
    assert len(held_out) > 15_000 and len(train) > 250_000


def test_english_rows_cover_the_text():
    text, cut = english("held_out"), english_rows("held_out")
    assert cut.shape == (len(text) // 64, 64) and torch.equal(cut.flatten(), text[: cut.numel()])
    assert (english("train") == 3).float().mean() < 1e-4  # unknown characters


def test_token_rows_have_one_length():
    mixed = token_rows("tasks", "train", 10, seed=0)
    assert mixed.shape == (10, 20) and token_rows("english", "train", 7, seed=0).shape == (7, 64)
    parts = torch.cat([token_rows(task, "train", 3, seed=0) for task in TASKS]).tolist()
    assert all(row in parts for row in mixed.tolist()) and len(set(map(tuple, mixed.tolist()))) == 10
    assert torch.equal(token_rows("english", "train", 7, seed=0), token_rows("english", "train", 7, seed=0))
    with pytest.raises(UserError, match="held_out rows, 1000000 were asked for"):
        token_rows("english", "held_out", 1_000_000, seed=0)
    with pytest.raises(UserError, match="source=chess is unknown; allowed: add, sort, copy, brackets, tasks, english"):
        token_rows("chess", "train", 1, seed=0)
