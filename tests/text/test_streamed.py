"""A released folder quantized layer by layer: what a cell makes of it in memory, bit for bit, or nothing at all."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dqbench import export
from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.export import save_packed
from dqbench.load import PACKED, from_packed, read_network
from dqbench.record import bill
from dqbench.run import Cell
from dqbench.text.streamed import METHODS, Job, stream
from dqbench.text.tokenizer import character_tokenizer
from tests.text.test_checkpoints import LAYERS, configure, edit, write
from tests.tiny import methods_for

PRESETS = {"llada": "llada_8b_base", "Dream": "dream_7b_base"}
BITS = {"quant_dllm": "w2a32", "quant_dllm_official": "w2a32", "gptq": "w3a32", "awq": "w4a32"}
GPTAQ = ["method=gptq", "method.damping.asymmetry=0.25", "bits=w2a32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with released models of both formats, with tokenizers, a text and prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("released"), character_tokenizer()
    for kind in PRESETS:
        released(folder / kind, kind)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "prompts.txt").write_text("a quick\na lazy\n")
    assert tokenizer.mask_token_id == 2
    return folder


def released(folder: Path, kind: str, **changes: object) -> Path:
    """A tiny released model that has the tokenizer of characters."""
    tokenizer = character_tokenizer()
    write(folder, kind, mask_token_id=tokenizer.mask_token_id, eos_token_id=1, pad_token_id=0, **changes)
    tokenizer.save_pretrained(folder)
    return folder


def config(data: Path, results: Path, kind: str, *overrides: str) -> DictConfig:
    """Of a cell on a released model: 6 masked rows of 12 tokens, 4 at a time."""
    files = [f"model.path={data / kind}", f"model.data={data / 'text.txt'}", f"model.prompts={data / 'prompts.txt'}"]
    few = ["calib.samples=6", "calib.batch_size=4", "calib.mask.length=12", "sampler.steps=4", "sampler.num_samples=4"]
    length = ["sampler.kwargs.gen_length=8"] + ["sampler.kwargs.block_length=8"] * (kind == "llada")
    named = [f"model={PRESETS[kind]}", "model.dtype=float32", "metrics=none", "tracking=none"]
    return compose([*named, *files, *few, *length, f"paths.results={results}", *overrides])


def in_memory(cfg: DictConfig, folder: Path) -> tuple[Cell, object]:
    """The cell, and its quantized pipeline, packed into `folder`."""
    cell = Cell(cfg)
    quantized = cell.quantize(cell.calibrate())
    save_packed(cell.load(quantized), folder)
    return cell, quantized


CASES = [(kind, [f"method={method}", f"bits={bits}"]) for kind in PRESETS for method, bits in BITS.items()]
CASES += [("llada", GPTAQ), ("llada", ["method=quant_dllm", "bits=w2a32", "model.dtype=bfloat16"])]


@pytest.mark.parametrize(("kind", "overrides"), CASES)
def test_layer_by_layer_gives_what_a_cell_gives_in_memory(kind, overrides, data, tmp_path):
    cfg = config(data, tmp_path / "results", kind, *overrides)
    cell, quantized = in_memory(cfg, tmp_path / "cell")
    found = stream(cfg, tmp_path / "streamed")
    (expected, theirs), (tensors, ours) = (
        read_network(tmp_path / name / "model" / PACKED) for name in ("cell", "streamed")
    )
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert ours == theirs
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    pipe, reference = from_packed(tmp_path / "streamed"), cell.load(quantized)
    assert torch.equal(pipe.model(ids).logits, reference.model(ids).logits)
    assert not torch.equal(pipe.model(ids).logits, cell.pipe.model(ids).logits)
    assert found["origin"]["cost"] == bill(cell, quantized)
    assert found["sizes"]["denoiser"]["tensor_bytes"] == found["sizes"]["billed_bytes"] or "bfloat16" in str(overrides)
    assert pipe.sampler == cell.sampler and type(pipe.scheduler) is type(reference.scheduler)
    made = [own("a quick", [torch.Generator().manual_seed(0)], 4).texts for own in (pipe, reference)]
    assert made[0] == made[1]
