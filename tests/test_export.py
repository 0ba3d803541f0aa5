"""Packed pipelines: outputs of every method survive bit for bit, sizes are those billed, damage is one clear line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dqbench import cost, export, load
from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, build, compose
from dqbench.errors import UserError
from dqbench.export import config_of, save_packed
from dqbench.identity import plain
from dqbench.load import from_packed, held, lines, read_manifest, read_network
from dqbench.models import UnconditionalPipeline, denoiser
from dqbench.quant import container, packing
from dqbench.quant.attach import freeze, installed, prepare, rounding
from dqbench.quant.block_formats import e2m1_values
from dqbench.quant.plan import select
from dqbench.quant.quantizers import Grid, WeightRule, weight_grid
from dqbench.quant.storage import save_storages, storages, unpack
from dqbench.quant.uniform import spread, store
from dqbench.record import attention_groups
from dqbench.results import Row
from dqbench.run import Cell
from dqbench.run import run as run_cell
from dqbench.sampling import generate, set_sampler
from dqbench.torchao_layout import of_uniform, save_torchao
from tests.tiny import calibration as calibration_of_tiny
from tests.tiny import ddim, methods_for, pipeline

ROOT = Path(__file__).resolve().parents[1]
METHODS = methods_for("image")
LEARNED = ("tfmq", "ptqd", "qdiffusion_")  # slow, and packed as qdiffusion is: at one width
CASES = [(name, width) for name in METHODS for width in (4, 3) if width == 4 or not name.startswith(LEARNED)]
SAMPLER = ddim(steps=2, eta=0.5)
FAST = ["recon.iters=1", "recon.iters_act=1", "recon.batch_size=4", "recon.act_init_samples=8"]
TINY = ["debug=tiny", "metrics=none", "tracking=none", "bits=w4a8"]
RULES = {
    "per_tensor": WeightRule("per_tensor", None, "mse", False, False),
    "per_channel": WeightRule("per_channel", None, "minmax", False, False),
    "symmetric": WeightRule("per_channel", None, "minmax", True, False),
    "per_group": WeightRule("per_group", 7, "minmax", False, False),
}


def odd_pipeline() -> UnconditionalPipeline:
    """Random weights in shapes that fill no byte, no group and no block: 15 channels, 9 to 270 columns."""
    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(15,), norm_num_groups=5,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=5,
    )  # fmt: skip
    pipe = UnconditionalPipeline(unet.eval().requires_grad_(False), DDPMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return set_sampler(pipe, SAMPLER)


def calibration(rows: int = 6, seed: int = 0) -> CalibrationSet:
    """Random inputs, the steps of the sampler in turn."""
    sample = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return CalibrationSet.from_tensors(sample, torch.tensor([50, 0]).repeat(rows)[:rows])


def quantized(name: str, bits: Bits):
    """The odd pipeline under a method; skips where the method refuses the width."""
    method = build(compose([f"method={name}", *FAST]).method)
    method = replace(method, chains=8) if hasattr(method, "chains") else method
    if hasattr(method, "check_bits"):
        try:
            method.check_bits(bits)
        except UserError as refused:
            pytest.skip(str(refused))
    return method(odd_pipeline(), calibration(), bits)


def bill(pipe, bits: Bits) -> int:
    """Bytes of the denoiser as a row has them."""
    unet = denoiser(pipe)
    found = cost.layers(odd_pipeline().unet, {"sample": [1, 8, 8]})
    return cost.cost(found, *installed(unet, bits), attention_groups(unet)).size_bytes


@pytest.mark.parametrize(("name", "weight"), CASES)
def test_every_method_survives_packing_bit_for_bit_at_the_billed_size(name, weight, tmp_path):
    bits = Bits(weight, 8, 8, 8)
    result = quantized(name, bits)
    manifest = save_packed(result, tmp_path / "packed")
    loaded = from_packed(tmp_path / "packed")
    state, batch = loaded.unet.state_dict(), calibration(8, seed=2).rows(np.arange(8))
    assert all(torch.equal(state[key], value) for key, value in result.unet.state_dict().items())
    assert torch.equal(loaded.unet(**batch).sample, result.unet(**batch).sample)
    assert type(loaded.scheduler) is type(result.scheduler)
    assert np.array_equal(generate(loaded, SAMPLER, [1, 2]), generate(result, SAMPLER, [1, 2]))
    assert manifest["sizes"]["unpacked"] == [] and loaded.sampler == result.sampler
    assert installed(loaded.unet, bits) == installed(result.unet, bits)
    stored, billed = manifest["sizes"]["denoiser"]["tensor_bytes"], bill(result, bits)
    assert abs(stored - billed) <= 0.01 * billed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize(("shape", "n_bits"), [((5, 3), 2), ((7, 5, 3), 3), ((3, 4, 3, 3), 5), ((9, 11), 8)])
def test_uniform_storage_is_exact_and_compact(shape, n_bits, split, rule):
    generator = torch.Generator().manual_seed(n_bits)
    weight, rule = torch.randn(shape, generator=generator), RULES[rule]
    grid = weight_grid(weight, n_bits, rule, split)
    baked = round_by_hand(weight, grid)
    stored = store(baked, grid, rule, split)
    back, tensors = unpack(stored.pack(), stored.header()), stored.pack()
    assert torch.equal(back, baked) and back.dtype == baked.dtype
    columns, groups = weight[0].numel(), 1 + (split > 0)
    if rule.group_size:
        edge = split * columns // shape[1]
        groups = sum(-(-part // rule.group_size) for part in (edge, columns - edge))
    scales = groups if rule.granularity == "per_tensor" else groups * shape[0]
    assert tensors["scale"].numel() == scales and stored.header()["bits"] == n_bits
    expected = -(-weight.numel() * n_bits // 8) + 4 * scales + -(-scales * n_bits // 8)
    assert packing.nbytes(tensors) == expected


def round_by_hand(weight, grid):
    """clip(round(w / scale) + z) back to values, spelt out."""
    codes = torch.clamp(torch.round(weight / grid.scale) + grid.zero_point, grid.qmin, grid.qmax)
    return (codes - grid.zero_point) * grid.scale


def test_codes_are_what_the_header_says_they_are():
    weight = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 0.25, -0.25]])
    grid = weight_grid(weight, 2, RULES["per_channel"])
    found = store(round_by_hand(weight, grid), grid, RULES["per_channel"], 0).pack()
    # Row 0: scale 1, zero point 1, codes 0 1 3. Row 1: scale 1/4, zero point 1, codes 3 2 0. Least significant first.
    assert found["scale"].flatten().tolist() == [1.0, 0.25] and found["zero_point"].tolist() == [0b0101]
    assert found["codes"].tolist() == [0b11_11_01_00, 0b00_10]


def test_zero_points_outside_of_the_codes_survive():
    weight = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) + torch.tensor([[3.0], [-5.0], [0.0]])
    grid = Grid(torch.full((3, 1), 0.0625), torch.tensor([[-48.0], [80.0], [0.0]]), 0, 15)
    stored = store(baked := round_by_hand(weight, grid), grid, RULES["per_channel"], 0)
    assert torch.equal(unpack(stored.pack(), stored.header()), baked) and len(baked.unique()) > 16
    assert stored.header()["zero_point"] == {"bits": 8, "low": -48}  # -48 to 80


def test_half_precision_weights_survive():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).half()
    grid = weight_grid(weight, 8, RULES["per_channel"])
    baked = (round_by_hand(weight.float(), grid)).half()
    back = unpack((stored := store(baked, grid, RULES["per_channel"], 0)).pack(), stored.header())
    assert torch.equal(back, baked) and back.dtype == torch.float16


def test_learned_rounding_is_stored_and_other_weights_are_not():
    unet = odd_pipeline().unet
    layers = prepare(unet, select(unet, Bits(4, 32, 32, 32), [], {}), RULES["per_channel"], {"conv_out": 5})
    with rounding(list(layers.values())[::2], first_half_only=False) as rounders:
        for rounder in rounders:
            rounder.alpha.data = torch.randn(rounder.alpha.shape)  # as learning might leave it: up or down at will
    unet.conv_in.weight.data += 1e-3  # no longer on its grid
    freeze(unet)
    assert set(storages(unet)) == set(layers) - {"conv_in"}
    for name, storage in storages(unet).items():
        weight = unet.get_submodule(name).weight
        back = unpack(storage.pack(), storage.header())
        assert torch.equal(back, weight) and torch.equal(torch.signbit(back), torch.signbit(weight))


def test_a_36_million_network_takes_less_than_a_seventh(tmp_path):
    config = plain(compose(["model=ddpm_cifar10"]).model.architecture)
    unet = UNet2DModel(**{key: value for key, value in config.items() if key != "_class_name"})
    pipe = UnconditionalPipeline(unet, DDPMScheduler())
    prepare(unet, select(unet, Bits(4, 32, 32, 32), [], {}), RULES["per_channel"], {})
    freeze(unet)
    found = cost.layers(unet, {"sample": [3, 32, 32]})
    billed = cost.cost(found, *installed(unet, Bits(4, 32, 32, 32))).size_bytes
    sizes = save_packed(pipe, tmp_path / "packed", billed=billed)["sizes"]["denoiser"]
    on_disk = sum(file.stat().st_size for file in (tmp_path / "packed").rglob("*") if file.is_file())
    assert sizes["fp32_bytes"] == 4 * 35746307 and sizes["tensor_bytes"] == billed
    assert sizes["file_bytes"] < on_disk <= 0.13 * sizes["fp32_bytes"] and on_disk == pytest.approx(billed, rel=1e-3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A small packed pipeline, not to be changed."""
    folder = tmp_path_factory.mktemp("packed") / "small"
    save_packed(quantized("rtn", Bits(4, 8, 8, 8)), folder, {"method": "rtn"}, layout="torchao")
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reseal(file: Path, **changes: object) -> None:
    """A manifest made elsewhere: changed (None: removed) and sealed again."""
    content = packing.without_seal(json.loads(file.read_text()) | changes)
    file.write_text(json.dumps(packing.seal({}, {key: value for key, value in content.items() if value is not None})))


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "unet/packed.safetensors", 5000), "truncated or altered: unet/packed"),
    "altered": (lambda f: flip(f / "unet/packed.safetensors"), "truncated or altered: unet/packed.safetensors"),
    "config": (lambda f: edit(f / "unet/config.json", sample_size=9), "truncated or altered: unet/config.json"),
    "missing": (lambda f: (f / "model_index.json").unlink(), "truncated or altered: model_index.json"),
    "manifest": (lambda f: edit(f / "manifest.json", sizes={}), "manifest.json is truncated or altered"),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 100), "manifest.json is truncated or altered"),
    "older": (lambda f: edit(f / "manifest.json", version=1), "has version 1 of dqbench.packed; this dqbench reads 2"),
    "newer": (lambda f: edit(f / "manifest.json", version=3), "has version 3 of dqbench.packed"),
    "foreign": (
        lambda f: reseal(f / "manifest.json", sizes=None),
        "is no packed pipeline: its manifest.json lacks sizes",
    ),
    "other kind": (lambda f: edit(f / "manifest.json", format="another"), "is no packed pipeline"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is no packed pipeline, manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_line(damage, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    from_packed(folder)
    change, line = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError) as refused:
        from_packed(folder)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_byte_changed_anywhere_is_noticed(packed, tmp_path):
    """In the safetensors header, the index and the data of a file on its own, and in any file of a folder."""
    content, folder = (packed / "unet/packed.safetensors").read_bytes(), shutil.copytree(packed, tmp_path / "copy")
    alone, header = tmp_path / "alone.safetensors", 8 + int.from_bytes(content[:8], "little")
    whole, read = container.read(packed / "unet/packed.safetensors"), 0
    for place in (*range(header), *range(header, len(content), 97), len(content) - 1):
        alone.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            container.read(alone)
        except UserError as refused:
            assert "\n" not in str(refused) and "alone.safetensors" in str(refused)
        else:
            read += 1
    assert read == 0 and whole[0]
    for file in (folder / "manifest.json", folder / "unet/config.json", folder / "unet/packed.safetensors"):
        content = file.read_bytes()
        for place in range(0, len(content), 1 + len(content) // 60):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            with pytest.raises(UserError):
                read_manifest(folder)
        file.write_bytes(content)
    assert read_manifest(folder)


def test_old_and_foreign_files_are_one_clear_line(packed, tmp_path):
    file = tmp_path / "other.safetensors"
    save_storages(from_packed(packed).unet, file)
    cases = {"holds version 1 of dqbench.weight_storage; this dqbench reads version 2 of dqbench.packed": lambda: None}
    cases["holds no packed network"] = lambda: save_file({"a": torch.zeros(2)}, file)
    cases["truncated or altered"] = lambda: file.write_bytes(b"no safetensors at all")
    cases["its index lacks layers, state, quantization"] = lambda: container.write(file, {"a": torch.zeros(2)}, {})
    for line, make in cases.items():
        make()
        with pytest.raises(UserError, match=line) as refused:
            read_network(file)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="weight storage of kind uniform is truncated or altered: its checksum"):
        unpack({}, {"kind": "uniform"})  # not sealed
    sealed = packing.seal({}, {"kind": "uniform", "version": 1})
    with pytest.raises(UserError, match="truncated or altered: KeyError"):
        unpack({}, sealed)


tensors_of_any_kind = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]),
        st.lists(st.integers(0, 5), max_size=4),
    ),
    max_size=6,
)


@given(tensors_of_any_kind, st.dictionaries(st.text(max_size=5), st.integers() | st.none(), max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_container_returns_what_went_in(tmp_path_factory, kinds, said):
    tensors = {f"a.{k}": (torch.rand(shape) * 9).to(dtype) for k, (dtype, shape) in enumerate(kinds)}
    content, file = {"said": said}, tmp_path_factory.mktemp("container") / "file"
    assert container.write(file, tensors, content) == packing.nbytes(tensors)
    back, found = container.read(file)
    assert found == content and list(back) == list(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        assert torch.equal(back[name].float(), value.float())


@pytest.mark.parametrize("name", ["rtn", "rtzs", "nvfp4", "quartz"])
def test_a_network_cast_to_half_precision_keeps_its_ranges_and_survives_packing(name, tmp_path):
    result = quantized(name, Bits(4, 8, 8, 8))
    exact = {key: value.clone() for key, value in result.unet.state_dict().items() if value.is_floating_point()}
    ranges = {key for key in exact if "quantizer" in key}
    result.to(torch.float16)
    state = result.unet.state_dict()
    assert ranges and all(torch.equal(state[key], exact[key]) for key in ranges)
    assert all(torch.equal(state[key], value.half()) for key, value in exact.items() if key not in ranges)
    save_packed(result, tmp_path / "packed")
    loaded = from_packed(tmp_path / "packed").unet
    assert loaded.dtype == torch.float16
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(loaded(sample, 50).sample, result.unet(sample, 50).sample)


def test_a_weight_changed_after_it_was_quantized_is_refused(tmp_path):
    result = quantized("mxfp4", Bits(4, 8, 8, 8))
    result.unet.conv_out.weight.data[0] += 1
    with pytest.raises(UserError, match="conv_out.weight is not what its storage holds"):
        save_packed(result, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_the_documented_example_reads_weights_with_safetensors_alone(packed):
    text = (ROOT / "docs" / "packed_format.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "dqbench" not in example.replace("dqbench.packed", "")
    found: dict = {"FILE": str(packed / "unet" / "packed.safetensors")}
    exec(example, found)  # noqa: S102
    unet = from_packed(packed).unet
    assert set(found["weights"]) == set(storages(unet))
    assert all(np.array_equal(weight, unet.get_submodule(name).weight) for name, weight in found["weights"].items())


def test_torchao_form_holds_the_weights(packed):
    unet, tensors = from_packed(packed).unet, load_file(packed / "unet" / "torchao.safetensors")
    names = {name.rpartition("._weight_")[0] for name in tensors}
    assert names == set(storages(unet))
    for name in names:
        codes, scale, zero_point = (tensors[f"{name}._weight_{key}"] for key in ("qdata", "scale", "zero_point"))
        assert torch.equal((codes.float() - zero_point) * scale, unet.get_submodule(name).weight)
        assert codes.dtype == zero_point.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7


@pytest.mark.parametrize(("shape", "rule", "split", "blocks"), [
    ((6, 21), "per_group", 0, [6, 3]), ((6, 20), "per_group", 0, None), ((6, 7, 3, 3), "per_group", 0, None),
    ((6, 5, 3), "per_tensor", 0, [1, 1, 1]), ((6, 20), "per_channel", 3, None),
])  # fmt: skip
def test_torchao_form_is_for_blocks_of_one_shape(shape, rule, split, blocks):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grid = weight_grid(weight, 4, RULES[rule], split)
    stored = store(round_by_hand(weight, grid), grid, RULES[rule], split)
    form = of_uniform(stored.pack(), stored.header())
    assert form is None if blocks is None else list(form.parts["scale"].shape) == blocks


@pytest.mark.parametrize(("name", "kind", "code_bits"), [
    ("quartz", "IntxUnpackedToInt8Tensor", 8), ("mxfp4", "MXTensor", 4), ("nvfp4", "NVFP4Tensor", 4),
])  # fmt: skip
def test_torchao_form_of_block_formats(name, kind, code_bits, tmp_path):
    result = build(compose([f"method={name}"]).method)(pipeline(), calibration_of_tiny(), Bits(4, 32, 32, 32))
    save_torchao(result.unet, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as content:
        described = {key: json.loads(value) for key, value in content.metadata().items() if key != "tensor_names"}
    tensors = load_file(tmp_path / "file")
    layer, weight = "time_embedding.linear_2", result.unet.time_embedding.linear_2.weight
    assert described[f"{layer}.weight"]["_type"] == kind and "conv_in.weight" not in described or code_bits == 8
    qdata, scale = (tensors[f"{layer}._weight_{key}"] for key in ("qdata", "scale"))
    assert 8 * qdata.numel() == code_bits * weight.numel()
    codes = qdata.float() if code_bits == 8 else e2m1_values(torch.stack([qdata & 15, qdata >> 4], dim=-1).flatten(1))
    values = scale.float() * tensors.get(f"{layer}._weight_per_tensor_scale", torch.ones(()))
    assert torch.equal(codes * values.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1), weight)


def test_torchao_reads_its_form(packed):
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    unet, file = from_packed(packed).unet, packed / "unet" / "torchao.safetensors"
    with safe_open(file, "pt") as content:
        state, rest = support.unflatten_tensor_state_dict(load_file(file), content.metadata())
    assert not rest and state
    for name, tensor in state.items():
        assert torch.equal(tensor.dequantize(), unet.get_parameter(name))


def test_spread_repeats_a_value_for_each_column_of_its_span():
    assert spread(torch.tensor([[1, 2]]), [(0, 3), (3, 5)]).tolist() == [[1, 1, 1, 2, 2]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, Row]:
    """(results folder, row) of a finished run of the embedded model."""
    folder = tmp_path_factory.mktemp("results")
    cfg = compose(["method=rtn", *TINY, f"paths.results={folder}"])
    row = run_cell(cfg)
    row.write(folder / "runs" / row.run_id)
    return folder, row


def command(monkeypatch, *arguments: str, main=export.main) -> int:
    """Exit status of python -m dqbench.export, or of another command."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_finished_run_is_exported_from_its_cache_or_computed_again(results, tmp_path, monkeypatch, capsys):
    folder, row = results
    where, bills = [f"run_id={row.run_id}", f"results={folder}"], tmp_path / "sizes.json"
    assert command(monkeypatch, *where, f"json={bills}") == 0
    packed, shown = folder / "runs" / row.run_id / "packed", capsys.readouterr().out
    assert "computed again" not in shown and "bill says" in shown
    cell = Cell(config_of(row, folder))
    own = cell.load(cell.quantize(cell.calibrate()))
    assert np.array_equal(generate(from_packed(packed), cell.sampler, [4]), generate(own, cell.sampler, [4]))
    sizes = json.loads(bills.read_text())["sizes"]
    assert sizes["denoiser"]["tensor_bytes"] == sizes["billed_bytes"] == row.cost["size_bytes"]
    assert sizes["denoiser"]["file_bytes"] == pytest.approx(row.cost["size_bytes"], rel=0.01)
    assert sizes["packed"]["tensor_bytes"] <= 0.16 * sizes["packed"]["fp32_bytes"]
    assert command(monkeypatch, *where) == 2 and "exists already" in capsys.readouterr().err
    shutil.rmtree(folder / "cache" / "quantized")
    assert command(monkeypatch, *where, f"to={tmp_path / 'again'}") == 0
    assert "computed again by this code" in capsys.readouterr().out
    first, again = (load_file(place / "unet" / "packed.safetensors") for place in (packed, tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in ("index", "data"))
    assert lines(held(packed, read_manifest(packed)))[0].startswith(f"run_id={row.run_id} model=digits_ddpm method=rtn")


def test_a_killed_export_leaves_no_folder_and_the_next_one_cleans_up(packed, tmp_path):
    script = (
        "import os, signal, sys, dqbench.export as export\n"
        "from dqbench.load import from_packed\n"
        "export.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.save_packed(from_packed(sys.argv[1]), sys.argv[2])\n"
    )
    target, environment = tmp_path / "packed", {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script, str(packed), str(target)], env=environment)
    assert killed.returncode == -signal.SIGKILL and list(tmp_path.iterdir()) == [tmp_path / ".packed.part"]
    save_packed(from_packed(packed), target)
    assert list(tmp_path.iterdir()) == [target] and from_packed(target)


def test_a_failed_export_leaves_nothing(packed, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dqbench.export.write_manifest", full)
    with pytest.raises(OSError):
        save_packed(from_packed(packed), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_load_checks_a_folder_and_says_what_it_holds(packed, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, packed, f"json={tmp_path / 'held.json'}", main=load.main) == 0
    content, layers = json.loads((tmp_path / "held.json").read_text()), len(storages(from_packed(packed).unet))
    assert content["layers"] == {"uniform, 4 bits": layers} and content["origin"] == {"method": "rtn"}
    assert f"packed weights: {layers} of uniform, 4 bits" in capsys.readouterr().out
    for arguments, line in (([], "allowed: FOLDER"), ([tmp_path], "is no packed pipeline")):
        assert command(monkeypatch, *arguments, main=load.main) == 2
        (shown,) = capsys.readouterr().err.splitlines()
        assert line in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run_id=0", "results=/nowhere"], "no finished runs are 0 in /nowhere"),
        (["run=0"], "run=0 is unknown; allowed: run_id=ID"),
        (["results=x"], "run_id=ID is missing"),
        (["run_id=0", "layout=gguf"], "layout=gguf is unknown; allowed: plain, torchao"),
    ],
)
def test_bad_arguments_are_one_line(arguments, line, monkeypatch, capsys):
    assert command(monkeypatch, *arguments) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert line in shown


def test_nothing_to_pack_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to pack"):
        save_packed(odd_pipeline(), tmp_path / "packed")
    with pytest.raises(UserError, match="nothing to pack"):
        save_packed(quantized("rtn", Bits(32, 8, 8, 8)), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
