"""What a language model is asked, calibrated and scored with: the miniature's tasks, or a user's text file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqbench.config import Model
from dqbench.errors import UserError, check_choice
from dqbench.identity import digest
from dqbench.models import read_prompts
from dqbench.text import tasks

TASKS = "text_tasks"  # model.data of the miniature
HELD_OUT = 0.1  # last part of a text file
SOURCES = ("english", "tasks", *tasks.TASKS)


@cache
def questions(task: str, count: int) -> tuple[list[str], list[str]]:
    """`count` held-out questions of a task and their answers, the same in every run."""
    return tasks.rows(task, "held_out", count, 0)


def task_of(index: int) -> tuple[str, int]:
    """Sample `index` asks the n-th question of a task: tasks take turns."""
    n, task = divmod(index, len(tasks.TASKS))
    return list(tasks.TASKS)[task], n


def ask(model: Model, indices: Sequence[int], total: int) -> list[str]:
    """The prompts of samples `indices` of `total`."""
    if model.data != TASKS:
        lines = read_prompts(model)
        return [lines[i % len(lines)] for i in indices]
    per_task = -(-total // len(tasks.TASKS))
    return [questions(task, per_task)[0][n] for task, n in map(task_of, indices)]


def answers(total: int) -> list[tuple[str, str]]:
    """(task, right answer) of every sample."""
    per_task = -(-total // len(tasks.TASKS))
    return [(task, questions(task, per_task)[1][n]) for task, n in map(task_of, range(total))]


def check_questions(model: Model, total: int) -> None:
    """Raise UserError where there is nothing to ask the model, or less than `total` held-out questions."""
    if model.data == TASKS:
        try:
            answers(total)
        except UserError as error:
            raise UserError(f"sampler.num_samples={total} is too many: {error}") from error
    elif not read_prompts(model):
        raise UserError(f"model={model.name} has nothing to be asked; give model.prompts=FILE, one prompt per line")


def check_rows(data: str | None, where: str, source: str, length: int | None) -> None:
    """Raise UserError where token_rows() would: for an unknown source of the miniature, a missing file or length."""
    if data == TASKS:
        check_choice(f"{where}.rows", source, SOURCES)
        return
    if data is None or not Path(data).expanduser().is_file():
        raise UserError(f"model.data={data} is no text file; give one to calibrate and to measure with")
    if length is None:
        raise UserError(f"{where}.length=null has no meaning for a text file; allowed: the tokens of a row, 2 or more")


def content_hash(data: str | None) -> str | None:
    """Of the texts and questions themselves; of the miniature's, which change with the package, a part."""
    if data == TASKS:
        return digest([TASKS, answers(64), tasks.english("train")[:4096].tolist()])
    return None if data is None else hashlib.sha256(Path(data).expanduser().read_bytes()).hexdigest()[:12]


def token_rows(
    model: Model, tokenizer: Any, source: str, split: str, count: int, length: int | None = None, seed: int = 0
) -> Tensor:
    """`count` rows of one length [count, L] of the model's data; split: train or held_out.

    The miniature's by `source`; of a text file consecutive pieces of `length` tokens, its last tenth held out: all of
    them where there are fewer.
    """
    if model.data == TASKS:
        return tasks.token_rows(source, split, count, seed)
    if tokenizer is None:
        raise UserError(f"model.path={model.path} has no tokenizer files (tokenizer.json), needed to read model.data")
    ids = torch.tensor(tokenizer(Path(model.data).expanduser().read_text()).input_ids)
    rows = ids[: len(ids) // length * length].view(-1, length)
    first = round(len(rows) * (1 - HELD_OUT))
    rows = rows[:first] if split == "train" else rows[first:]
    least = 2 if split == "held_out" else count
    if len(rows) < least:
        raise UserError(f"model.data={model.data} has {len(rows)} {split} rows of {length} tokens; {least} are needed")
    return rows[:count]
