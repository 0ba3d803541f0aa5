"""A cell on a language model: from its config to a row, with the metrics, bills and refusals of its own kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import dqbench
from dqbench.config import Model, compose
from dqbench.cost import report
from dqbench.errors import UserError
from dqbench.export import save_packed
from dqbench.load import from_packed
from dqbench.quant.checkpoint import load_pipeline, save_pipeline
from dqbench.run import Cell
from dqbench.text.data import answers, ask, token_rows
from dqbench.text.metrics import Likelihood, TextMetrics
from dqbench.text.modality import positions
from dqbench.text.networks import BidirectionalLlama
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler
from dqbench.text.tokenizer import character_tokenizer
from tests.text.test_checkpoints import write
from tests.tiny import methods_for

WEIGHTS_ONLY = ("awq", "quant_dllm", "quant_dllm_official")
FEW = ["sampler.num_samples=8", "sampler.batch_size=8", "sampler.steps=4", "calib.samples=8", "calib.batch_size=4"]
FEW += ["metrics.likelihood.count=4", "metrics.likelihood.draws=2", "metrics.bootstrap=2", "tracking=none", "seed=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a random network of the miniature's class."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    MaskedDiffusionPipeline(BidirectionalLlama(config).eval(), LLaDAScheduler(8, 8), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def overrides(model: Path, tmp_path: Path) -> list[str]:
    return ["model=text_mdlm", f"model.path={model}", f"paths.results={tmp_path}", *FEW]


def test_a_language_model_ends_in_a_row_of_its_own_metrics(overrides, tmp_path):
    row = dqbench.run([*overrides, "method=rtn", "bits=w4a8"])
    assert set(row.metrics) == {"exact", "exact_add", "exact_sort", "exact_copy", "exact_brackets", "nll_bits"}
    assert set(row.paired) == {"same_tokens", "agreement", "kl"} and row.paired["kl"]["value"] > 0
    assert 7.5 < row.cost["bits_per_act"] <= 8 and 4 < row.cost["bits_per_weight"] < 9
    assert row.diagnostics["KL to full precision"]["x_label"] == "masked share"
    folder = tmp_path / "runs" / row.run_id
    assert len((folder / "samples.txt").read_text().splitlines()) == 9 and (folder / "curves.png").exists()
    same = dqbench.run([*overrides, "method=rtn", "bits=w32a32"])
    assert same.paired["kl"]["value"] == 0 and same.paired["same_tokens"]["value"] == 1
    assert same.difference["nll_bits"]["value"] == 0


def test_samples_do_not_depend_on_their_batch(overrides):
    def made(*more: str) -> np.ndarray:
        cell = Cell(compose([*overrides, "method=fp32", *more]))
        return cell.modality.sample(cell, cell.pipe, range(2, 5))["sample"]

    noisy = "sampler.kwargs.temperature=1.0"
    cell = Cell(compose([*overrides, "method=fp32", noisy]))
    alone = cell.modality.sample(cell, cell.pipe, range(3, 4))["sample"]
    assert np.array_equal(made(noisy)[1:2], alone) and not np.array_equal(made(noisy), made())


def test_calibration_rows_are_masked_training_text_and_shared(overrides):
    cell = Cell(compose([*overrides, "method=rtn"]))
    found = cell.calibrate()
    ids, step = (np.load(found.folder / f"{name}.npy") for name in ("input_ids", "step"))
    mask_id = cell.pipe.tokenizer.mask_token_id
    plain = token_rows(cell.model, cell.pipe.tokenizer, "english", "train", 8).numpy()
    assert ids.shape == (8, 64) and step.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert np.array_equal(ids[:, :16], plain[:, :16]) and (ids[7, 16:] == mask_id).all()
    assert ((ids == plain) | (ids == mask_id)).all()
    assert cell.calibrate().key == Cell(compose([*overrides, "method=quartz"])).calibrate().key
    assert positions(np.array([0.5, 1.0, 0.5])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method=ptqd"], "method=ptqd works on image models; model=text_mdlm makes text"),
        (["calib=uniform", "calib.steps=4"], "this calib is not made for text; allowed for model=text_mdlm: calib=mcs"),
        (["calib.mask.gamma=1.5"], "calib.mask.gamma=1.5 is out of range"),
        (["calib.mask.mode=some"], "allowed: none, per_sample_grid, cross"),
        (["sampler.steps=0"], "sampler.steps"),
        (
            ["sampler=ddim50", "sampler.steps=4"],
            "DDIMScheduler does not sample text; allowed for model=text_mdlm: sampler=llada8",
        ),
        (["sampler.num_samples=8000"], "num_samples=8000 is too many: task 'add' has 814 held_out questions"),
        (["calib.mask.rows=typo"], "calib.mask.rows=typo is unknown; allowed: english, tasks, add"),
        (["calib.mask.rows=add", "calib.samples=9000"], "has 7286 train questions, 9000 were asked for"),
        (["metrics.likelihood.rows=typo"], "metrics.likelihood.rows=typo is unknown"),
        (["metrics.likelihood.count=5000"], "has 419 held_out rows, 5000 were asked for"),
        (["model.data=/nowhere", "metrics.tasks=false", f"model.prompts={__file__}"], "/nowhere is no text file"),
        (
            [f"model.data={__file__}", "metrics.tasks=false", f"model.prompts={__file__}"],
            "calib.mask.length=null has no",
        ),
        (["sampler.kwargs.block_length=3"], "gen_length=8 must be a multiple of block_length=3"),
        (
            [f"model.data={__file__}", f"model.prompts={__file__}", "calib.mask.length=12"],
            "has no answers to check; allowed: metrics.tasks=false",
        ),
        (["model.data=null", "metrics.tasks=false"], "nothing to be asked; give model.prompts=FILE"),
    ],
)
def test_what_has_no_meaning_for_text_is_refused_early(changes, message, overrides, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        Cell(compose([*overrides, "method=rtn", *changes]))
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_image_metrics_are_refused_for_texts(model, tmp_path):
    with pytest.raises(UserError, match="these metrics cannot score text; allowed for model=text_mdlm: metrics=text"):
        Cell(compose(["model=text_mdlm", f"model.path={model}", f"paths.results={tmp_path}", "metrics=digits"]))
    Cell(compose(["model=text_mdlm", f"model.path={model}", f"paths.results={tmp_path}", "metrics=none"]))


@pytest.mark.parametrize("changes", [["metrics=text"], ["calib=mcs"], ["sampler=llada8", "calib.steps=4"]])
def test_text_settings_are_refused_for_images(changes, tmp_path):
    with pytest.raises(UserError, match="allowed for model=digits_ddpm"):
        Cell(compose(["debug=tiny", "metrics=none", f"paths.results={tmp_path}", *changes]))


def test_an_answer_counts_when_all_of_it_is_right():
    scorer = TextMetrics(1, True, Likelihood("english", 4, 2, "count", None), 2, 8, 0)
    tokenizer, asked = character_tokenizer(), answers(8)
    ids = [tokenizer(answer).input_ids for _, answer in asked]
    rows = np.array([[*row, *[tokenizer.eos_token_id] * (8 - len(row))] for row in ids], np.int32)
    rows[0, len(ids[0]) - 1] = rows[4, len(ids[4])] = tokenizer("z").input_ids[0]  # a wrong digit; one too many
    found = scorer.score(rows, "text_tasks", Path())
    assert found["exact_add"].value == 0 and found["exact"].value == 6 / 8
    assert 0 < found["exact"].low < 6 / 8 < found["exact"].high < 1
    assert [task for task, _ in asked[:5]] == ["add", "sort", "copy", "brackets", "add"]
    preset = compose(["model=text_mdlm"]).model
    assert len(set(ask(Model(**preset), range(8), 8))) == 8


def test_the_bill_of_a_preset_needs_no_weights(overrides):
    bill = report(compose([*overrides, "method=rtn", "bits=w4a8"]))
    macs = {layer["name"]: layer["macs"] for layer in bill["layers"] if layer["macs"]}
    assert macs["model.layers.0.mlp.down_proj"] == 20 * 64 * 32
    assert macs["lm_head"] == 20 * 32 * len(character_tokenizer())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "PreTrainedModel", "Tensor"])
def test_only_our_text_networks_are_known_by_name(name, tmp_path):
    path = [f"model.path={tmp_path / 'none'}", f"model.architecture._class_name={name}"]
    with pytest.raises(UserError, match=f"_class_name={name} is unknown; allowed: .*BidirectionalLlama"):
        report(compose(["model=llada_8b_base", "method=rtn", *path]))


def test_texts_of_a_file_are_cut_and_its_end_is_held_out(overrides, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(4 * 50)))
    preset = Model(**{**compose(["model=text_mdlm"]).model, "data": str(file)})
    tokenizer = character_tokenizer()
    train, held_out = (token_rows(preset, tokenizer, "text", split, 5, 4) for split in ("train", "held_out"))
    assert tokenizer.batch_decode(train[:2]) == ["abcd", "efgh"] and not set(map(tuple, train.tolist())) - set(
        map(tuple, token_rows(preset, tokenizer, "text", "train", 45, 4).tolist())
    )
    assert tokenizer.decode(held_out[0]) == "".join(chr(97 + i % 26) for i in range(180, 184))
    assert torch.equal(token_rows(preset, tokenizer, "text", "held_out", 99, 4), held_out)  # all there are
    with pytest.raises(UserError, match="has 45 train rows of 4 tokens; 46 are needed"):
        token_rows(preset, tokenizer, "text", "train", 46, 4)
    with pytest.raises(UserError, match="has 0 held_out rows of 50 tokens; 2 are needed"):
        token_rows(preset, tokenizer, "text", "held_out", 5, 50)


def test_a_released_checkpoint_is_quantized_where_it_lies(tmp_path):
    folder, file, prompts = tmp_path / "llada", tmp_path / "text.txt", tmp_path / "prompts.txt"
    tokenizer = character_tokenizer()
    folder.mkdir()
    write(folder, "llada", mask_token_id=tokenizer.mask_token_id, eos_token_id=1, pad_token_id=0)
    tokenizer.save_pretrained(folder)
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    prompts.write_text("a quick\na lazy\n")
    overrides = [f"model.path={folder}", f"model.data={file}", f"model.prompts={prompts}", "model.dtype=float32"]
    overrides += ["sampler.steps=4", "sampler.kwargs.gen_length=8", "sampler.kwargs.block_length=8", "calib.samples=4"]
    overrides += [
        "sampler.num_samples=4",
        "calib.mask.length=12",
        "metrics=text",
        "metrics.tasks=false",
        "tracking=none",
    ]
    overrides += [
        "metrics.likelihood={rows: text, count: 4, draws: 2, masks: count, length: 12}",
        "metrics.bootstrap=2",
    ]
    row = dqbench.run(
        ["model=llada_8b_base", "method=rtn", "bits=w4a8", f"paths.results={tmp_path / 'res'}", *overrides]
    )
    assert set(row.metrics) == {"nll_bits"} and row.paired["kl"]["n"] > 1
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        Cell(compose(["model=llada_8b_base", "method=rtn", *overrides]))


@pytest.mark.parametrize("method", methods_for("text"))
def test_every_method_for_texts_quantizes_one(method, overrides):
    bits = "w4a32" if "gptq" in method or method in WEIGHTS_ONLY else "w4a8"
    small = ["recon.iters=2", "recon.iters_act=2", "recon.batch_size=4", "recon.act_init_samples=4"]
    cell = Cell(compose([*overrides, f"method={method}", f"bits={bits}", *small]))
    pipe = cell.load(cell.quantize(cell.calibrate()))
    ids = token_rows(cell.model, pipe.tokenizer, "english", "held_out", 4)
    wanted, found = (own.model(ids).logits for own in (cell.pipe, pipe))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.5
    assert any(hasattr(layer, "weight_storage") for layer in pipe.model.modules())


def test_a_quantized_language_model_is_packed_saved_and_loaded(overrides, tmp_path):
    cell = Cell(compose([*overrides, "method=quant_dllm", "bits=w2a32"]))
    pipe = cell.load(cell.quantize(cell.calibrate()))
    ids = token_rows(cell.model, pipe.tokenizer, "english", "held_out", 4)
    wanted = pipe.model(ids).logits
    assert not torch.equal(wanted, cell.pipe.model(ids).logits)
    save_pipeline(pipe, tmp_path / "saved")
    save_packed(pipe, tmp_path / "packed")
    for loaded in (load_pipeline(tmp_path / "saved"), from_packed(tmp_path / "packed")):
        assert torch.equal(loaded.model(ids).logits, wanted)
        assert loaded("      12+34=", num_inference_steps=4).texts == pipe("      12+34=", num_inference_steps=4).texts
