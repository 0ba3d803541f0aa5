"""A released folder quantized layer by layer: what a cell makes of it in memory, bit for bit, or nothing at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dqbench import export
from dqbench.config import build, compose
from dqbench.errors import UserError
from dqbench.export import save_packed
from dqbench.load import PACKED, from_packed, read_network
from dqbench.quant.container import Writer
from dqbench.record import bill
from dqbench.run import Cell
from dqbench.text.released import Checkpoint
from dqbench.text.streamed import METHODS, Job, Sink, stream
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


def test_tied_embeddings_are_stored_once_and_tied_again(data, tmp_path):
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("model.transformer.ff_out.weight", None)

    folder = released(tmp_path / "llada", "llada", weight_tying=True)
    for file in folder.glob("*.safetensors"):
        edit(folder, untie, file.name)
    (tmp_path / "text.txt").write_text((data / "text.txt").read_text())
    (tmp_path / "prompts.txt").write_text("a quick\n")
    cfg = config(tmp_path, tmp_path / "results", "llada", "method=quant_dllm", "bits=w2a32")
    cell, quantized = in_memory(cfg, tmp_path / "cell")
    sizes = stream(cfg, tmp_path / "streamed")["sizes"]
    ids = torch.arange(12)[None]
    for name in ("cell", "streamed"):
        pipe = from_packed(tmp_path / name)
        assert pipe.model.lm_head.weight is pipe.model.model.embed_tokens.weight
        assert torch.equal(pipe.model(ids).logits, cell.load(quantized).model(ids).logits)
    assert sizes["denoiser"]["tensor_bytes"] == sizes["billed_bytes"] == bill(cell, quantized)["size_bytes"]
    assert load_sizes(tmp_path / "cell") == sizes["denoiser"]["tensor_bytes"]


def load_sizes(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["sizes"]["denoiser"]["tensor_bytes"]


def test_methods_that_can_are_those_named():
    able = [name for name in methods_for("text") if hasattr(preset(name), "quantize_layer")]
    assert set(able) == set(METHODS)


def preset(name: str) -> object:
    return build(compose([f"method={name}"]).method)


REFUSED = {
    "method": (["method=rtn"], "method=rtn needs the whole network; layer by layer: quant_dllm, quant_dllm_official"),
    "activations": (["method=gptq", "bits=w4a8"], "bits.act=8: method=gptq, layer by layer, quantizes weights alone"),
    "outside": (["method=gptq", "bits=w4a32", "method.skip=[]"], "lm_head: in none of model.units"),
    "nothing": (["method=gptq", "bits=w32a32"], "there is nothing to pack"),
    "data": (["model.data=/nowhere"], "model.data=/nowhere is no text file"),
    "rows": (["calib.samples=5000"], "has 135 train rows of 12 tokens; 5000 are needed"),
    "file": ([f"model.path={__file__}"], "is a file; give the folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(case, data, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        stream(
            config(data, tmp_path / "results", "llada", "method=quant_dllm", "bits=w2a32", *changes), tmp_path / "to"
        )
    assert "\n" not in str(refused.value) and not [path for path in tmp_path.iterdir() if path.name != "results"]


def test_other_models_are_refused(tmp_path):
    for model, message in (("digits_ddpm", "works on text models"), ("text_mdlm", "is no released language model")):
        cfg = compose([f"model={model}", "method=quant_dllm", "bits=w2a32", f"paths.results={tmp_path}"])
        with pytest.raises(UserError, match=message):
            stream(cfg, tmp_path / "to")


def test_models_that_cannot_be_calibrated_are_refused(data, tmp_path):
    text, foreign = (data / "text.txt").read_text(), tmp_path / "llada"
    (tmp_path / "text.txt").write_text(text)
    write(foreign, "llada")
    with pytest.raises(UserError, match="has no tokenizer files"):
        stream(config(tmp_path, tmp_path / "results", "llada", "method=gptq", "bits=w4a32"), tmp_path / "to")
    released(foreign, "llada")
    configure(foreign, mask_token_id="absent", model_type="nothing")
    with pytest.raises(UserError, match="model_type nothing .* is unknown"):
        stream(config(tmp_path, tmp_path / "results", "llada", "method=gptq", "bits=w4a32"), tmp_path / "to")


def test_a_failure_leaves_nothing_and_a_kill_what_the_next_attempt_clears(data, tmp_path, monkeypatch, capsys):
    cfg = config(data, tmp_path / "results", "llada", "method=gptq", "bits=w4a32")
    folder, calls = tmp_path / "to" / "packed", []

    def fail(*_: object) -> None:
        calls.append(sorted(path.name for path in folder.parent.iterdir()))
        raise OSError("No space left on device")

    monkeypatch.setattr("dqbench.text.streamed.pack_state", fail)
    with pytest.raises(OSError, match="No space"):
        stream(cfg, folder)
    assert calls == [[".packed.part"]] and not list(folder.parent.iterdir())
    monkeypatch.undo()
    (folder.parent / ".packed.part").mkdir()
    (folder.parent / ".packed.part" / "stale").touch()
    stream(cfg, folder)
    assert list(folder.parent.iterdir()) == [folder] and not (folder / "stale").exists()
    with pytest.raises(UserError, match="exists already"):
        stream(cfg, folder)


def test_one_decoder_layer_is_in_memory_at_a_time(data, tmp_path, monkeypatch):
    cfg = config(data, tmp_path / "results", "llada", "method=gptq", "bits=w4a32")
    resident, read = [], []
    own, rows = Sink.__call__, Checkpoint.rows

    def look(sink: Sink, name: str, layer: torch.nn.Module) -> None:
        own(sink, name, layer)
        resident.append({key.split(".")[2] for key, value in job.network.named_parameters() if not value.is_meta})

    monkeypatch.setattr(Sink, "__call__", look)
    monkeypatch.setattr(
        Checkpoint, "rows", lambda own, name, ids: read.append((name, ids.numel())) or rows(own, name, ids)
    )
    monkeypatch.setattr("dqbench.text.released.PIECE", 320)
    job = Job(cfg, 0)
    with Writer(tmp_path / "file") as writer:
        job.write(writer)
    assert resident == [{str(i)} for i in range(LAYERS)] and all(value.is_meta for value in job.network.parameters())
    assert max(count for _, count in read[2:]) <= 32 and len(read) > 20


def test_the_command_says_what_it_wrote(data, tmp_path, monkeypatch, capsys):
    files = [f"model.path={data / 'llada'}", f"model.data={data / 'text.txt'}", f"paths.results={tmp_path}"]
    few = ["model=llada_8b_base", "model.dtype=float32", "calib.samples=2", "calib.mask.length=12"]
    own = [*few, *files, "method=quant_dllm", "bits=w2a32"]
    for arguments, status, line in (
        ([*own, f"to={tmp_path / 'packed'}", f"json={tmp_path / 'out.json'}"], 0, "3 of 3"),
        (own, 2, "to=FOLDER is missing"),
        ([*own, "to=x", "layout=torchao"], 2, "layout=torchao belongs to a finished run"),
        ([*own, "to=x", "method.nothing=1"], 2, "nothing"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        try:
            export.main()
            found = 0
        except SystemExit as end:
            found = end.code
        shown = capsys.readouterr()
        assert found == status and line in shown.err
        if not status:
            assert "bits per weight" in shown.out and "peak memory" in shown.out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["layers"] == {"multi_binary": 7 * LAYERS} and content["memory"]["peak"] > content["memory"]["start"]
    assert content["sizes"]["denoiser"]["tensor_bytes"] == content["sizes"]["billed_bytes"]
