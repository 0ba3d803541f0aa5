"""The card of the text miniature: exact match on held-out questions, a likelihood bound on held-out English."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch import Tensor

from dqbench.metrics.base import mean_interval
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.tasks import SPLITS, TASKS, english, rows
from dqbench.zoo.text import english_bits, solve

FEW_STEPS = 2
AVAILABLE = {"add": 814}  # held-out questions; the other tasks have more than anyone asks
ENGLISH_DRAWS = {"train": (1, 10), "held_out": (16, 1)}  # draws of masks per row, of every n-th row

TEXT_CARD = """# text_mdlm

A masked-diffusion language model of characters, small enough to quantize on a CPU in a minute.

- Data: four tasks with checkable answers (`dqbench/text/tasks.py`) and the English of Python's own documentation \
(`pydoc_data.topics` of Python {python}: {train_characters:,} characters to train).
- Model: LLaDA's (arXiv:2502.09992), a Llama that attends both ways: 4 layers of width 256, 8 heads, 100 \
characters and special tokens, {parameters:,} parameters, float16 ({megabytes:.2f} MB).
- Training: LLaDA's loss; {iterations:,} iterations of {batch_size} rows, bfloat16 matrix products, seed {seed}, \
averaged weights; settings in `dqbench/zoo/text_mdlm.yaml`. {minutes:.0f} minutes on {device} \
(threads: {threads}), torch {torch}.
- Format: a question is 12 characters, padded on the left by spaces, its answer 8 tokens: characters, then `<eos>` to \
the end. English: rows of 64 characters without prompt. No row is padded.

What is held out was never trained on: a fixed tenth of each task's questions (of additions with their commuted ones), \
a tenth of the documentation's pages ({held_out_characters:,} characters), with every paragraph that other pages share \
with them.

Measured on the shipped weights, computed in float32. Exact match of the generated answers, LLaDA's sampler, 8 steps, \
one block, low-confidence remasking, temperature 0; [low, high] is the 95 % Wilson interval:

| task | question -> answer | held out | training split | held out, {few_steps} steps |
|---|---|---|---|---|
{exact}

Upper bound on the bits per character of English (Monte Carlo, stratified; t interval over rows of 64 characters):

| | rows | draws per row | bits per character |
|---|---|---|---|
{bits}

It is a bound for short rows without context, no perplexity to compare with an autoregressive model's. Another Python \
version has other pages, hence another bound.

    from dqbench.text.pipeline import MaskedDiffusionPipeline
    pipe = MaskedDiffusionPipeline.from_pretrained("dqbench/zoo/text_mdlm")
    pipe("      27+58=", num_inference_steps=8).texts     # ["85"]

    python -m dqbench.zoo.train text_mdlm     # trains it again, about an hour of one CPU core
    python -m dqbench.zoo.card text_mdlm      # measures it and writes this card
"""


def text_card(folder: Path, count: int) -> str:
    """`count`: questions of each task and split, where there are as many."""
    pipe = MaskedDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    training = json.loads((folder / "training.json").read_text())
    return TEXT_CARD.format(
        **training,
        minutes=training["seconds"] / 60,
        megabytes=(folder / "model" / "model.safetensors").stat().st_size / 1e6,
        train_characters=len(english("train")),
        held_out_characters=len(english("held_out")),
        few_steps=FEW_STEPS,
        exact="\n".join(task_line(pipe, task, count) for task in TASKS),
        bits="\n".join(english_line(pipe, split) for split in SPLITS),
    )


def task_line(pipe: MaskedDiffusionPipeline, task: str, count: int) -> str:
    """A row of the table: an example, then exact match held out, trained on, and held out with few steps."""
    count = min(count, AVAILABLE.get(task, count))
    prompts, answers = rows(task, "held_out", 1, seed=1)
    held_out, trained = (solve(pipe, task, split, count) for split in reversed(SPLITS))
    few = solve(pipe, task, "held_out", count, FEW_STEPS)
    example = f"`{prompts[0].strip()}` -> `{answers[0]}`"
    return f"| {task} | {example} | {share(held_out)} | {share(trained)} | {share(few)} |"


def english_line(pipe: MaskedDiffusionPipeline, split: str) -> str:
    draws, every = ENGLISH_DRAWS[split]
    bits = english_bits(pipe.model, split, draws, every)
    mean, half = mean_interval(bits.numpy())
    return f"| {split.replace('_', ' ')} | {len(bits)} | {draws} | {mean:.3f} ± {half:.3f} |"


def share(right: Tensor) -> str:
    """'97.4% [96.1, 98.3] of 814'."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return f"{right.double().mean():.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}] of {len(right)}"
