"""What the text miniature learns: four tasks with checkable answers, and English from Python's own documentation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pydoc_data.topics import topics

import torch
from torch import Tensor

from dqbench.errors import UserError, check_choice
from dqbench.text.tokenizer import character_tokenizer

PROMPT_LENGTH, ANSWER_LENGTH, ENGLISH_LENGTH = 12, 8, 64
HELD_OUT = 0.1  # share of the questions of each task, and of the topics of the English text
SPLITS = ("train", "held_out")
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
PLAIN = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."}
Question = tuple[str, str]  # prompt without padding, answer


def add(rng: random.Random) -> Iterator[Question]:
    """All 8,100 ordered pairs of two-digit numbers, shuffled: 12+34= -> 46."""
    pairs = list(product(range(10, 100), repeat=2))
    rng.shuffle(pairs)
    return ((f"{a}+{b}=", str(a + b)) for a, b in pairs)


def sort(rng: random.Random) -> Iterator[Question]:
    """Three to six digits in ascending order: sort 4172= -> 1247."""
    while True:
        digits = rng.choices("0123456789", k=rng.randint(3, 6))
        yield f"sort {''.join(digits)}=", "".join(sorted(digits))


def copy(rng: random.Random) -> Iterator[Question]:
    """Three to six letters again: copy qzwr= -> qzwr."""
    while True:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6)))
        yield f"copy {word}=", word


def brackets(rng: random.Random) -> Iterator[Question]:
    """The brackets that close 3 to 11 characters of balanced text: ([]{= -> }). At most seven are open."""
    while True:
        text, closing = "", ""
        for _ in range(rng.randint(3, 11)):
            if closing and (len(closing) == ANSWER_LENGTH - 1 or rng.random() < 0.4):
                text, closing = text + closing[0], closing[1:]
            else:
                opening = rng.choice(list(CLOSING))
                text, closing = text + opening, CLOSING[opening] + closing
        if closing:
            yield f"{text}=", closing


TASKS: dict[str, Callable[[random.Random], Iterator[Question]]] = {
    "add": add, "sort": sort, "copy": copy, "brackets": brackets,
}  # fmt: skip


def is_held_out(key: str) -> bool:
    """A fixed pseudo-random tenth of all keys."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < HELD_OUT * 2**64


def question_key(prompt: str) -> str:
    """The same for a+b and b+a, so that no split knows the other's sums; other prompts hold no plus sign."""
    return "+".join(sorted(prompt.rstrip("=").split("+")))


def rows(task: str, split: str, count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` different questions: prompts of 12 characters, padded on the left, and their answers."""
    found: dict[str, str] = {}
    for prompt, answer in TASKS[task](random.Random(f"{task}/{split}/{seed}")):
        if len(found) == count:
            break
        if is_held_out(question_key(prompt)) == (split == "held_out"):
            found[prompt.rjust(PROMPT_LENGTH)] = answer
    if len(found) < count:
        raise UserError(f"task {task!r} has {len(found)} {split} questions, {count} were asked for")
    return list(found), list(found.values())


def encode(prompts: list[str], answers: list[str]) -> Tensor:
    """Token ids [N, 20]: prompt, answer, <eos> to the end."""
    tokenizer = character_tokenizer()
    ids = tokenizer([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]).input_ids
    filled = [row + [tokenizer.eos_token_id] * (PROMPT_LENGTH + ANSWER_LENGTH - len(row)) for row in ids]
    return torch.tensor(filled)


def exact_match(texts: list[str], answers: list[str]) -> Tensor:
    """Which generated texts are the answers, character by character: [N] bool."""
    return torch.tensor([text == answer for text, answer in zip(texts, answers, strict=True)], dtype=torch.bool)


def paragraphs(split: str) -> list[str]:
    """Paragraphs of the pages of `pydoc_data.topics` in this split: whole pages, in alphabetical order.

    The pages repeat each other's sections: what stands on a held-out page, whatever its line breaks, is not trained on.
    """
    held_out = [text for name in sorted(topics) if is_held_out(name) for text in topics[name].split("\n\n")]
    if split == "held_out":
        return held_out
    known = {" ".join(text.split()) for text in held_out}
    training = [text for name in sorted(topics) if not is_held_out(name) for text in topics[name].split("\n\n")]
    return [text for text in training if " ".join(text.split()) not in known]


@cache
def english(split: str) -> Tensor:
    """Token ids [N] of the text of a split."""
    text = "\n\n".join(paragraphs(split)).translate(str.maketrans(PLAIN))
    return torch.tensor(character_tokenizer()(text).input_ids)


def english_rows(split: str) -> Tensor:
    """The text of a split cut into rows of 64 characters: [N, 64]."""
    text = english(split)
    return text[: len(text) // ENGLISH_LENGTH * ENGLISH_LENGTH].view(-1, ENGLISH_LENGTH)


def token_rows(source: str, split: str, count: int, seed: int) -> Tensor:
    """`count` different rows of one length, to calibrate or to measure with: of a task, of all tasks, or of English.

    source: a task or "tasks" for equal shares of all four, [N, 20]; "english", [N, 64].
    """
    check_choice("source", source, (*TASKS, "tasks", "english"))
    if source in TASKS:
        return encode(*rows(source, split, count, seed))
    pool = english_rows(split) if source == "english" else mixed_rows(split, -(-count // len(TASKS)), seed)
    if len(pool) < count:
        raise UserError(f"the English text has {len(pool)} {split} rows, {count} were asked for")
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]


def mixed_rows(split: str, count: int, seed: int) -> Tensor:
    """`count` rows of each task, [4 count, 20]."""
    return torch.cat([encode(*rows(task, split, count, seed)) for task in TASKS])
