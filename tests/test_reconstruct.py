"""Reconstruction lowers the error, replay changes nothing, orders and phases are what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, build, compose
from dqbench.errors import UserError
from dqbench.models import load
from dqbench.quant.attach import calibrating, find_units, prepare, quantize_attention, quantize_inputs
from dqbench.quant.capture import Recorder, trace_units
from dqbench.quant.plan import select
from dqbench.quant.quantizers import ActRule, WeightRule, act_quantizers
from dqbench.quant.reconstruct import (
    Job,
    reconstruct_activations,
    reconstruct_weights,
    set_beta,
    steps_of,
)
from dqbench.stages import resuming
from tests.tiny import calibration, pipeline, recon

UNITS = ["*.resnets.?", "*.attentions.?"]
WEIGHT = WeightRule("per_channel", None, "mse", False, False)
ACT = ActRule("mse", False, "first", 0.0, False, False)


def make_job(official_order=(), **changes) -> Job:
    """A prepared w3a4 job on the tiny pipeline."""
    teacher = pipeline().unet
    student = copy.deepcopy(teacher)
    layers = prepare(student, select(student, Bits(3, 4, 4, 8), [], {}), WEIGHT, {})
    return Job(
        student, teacher, find_units(student, UNITS, layers), layers, calibration(), recon(**changes), official_order
    )


def output_error(job: Job) -> float:
    """Mean squared distance to the teacher on inputs that were not calibrated with."""
    batch = calibration(64, seed=1).rows(range(64))
    with torch.no_grad():
        return (job.student(**batch).sample - job.teacher(**batch).sample).square().mean().item()


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: item.layer.weight.clone() for name, item in job.layers.items()}


def test_learned_rounding_beats_nearest():
    job = make_job(iters=60)
    nearest = output_error(job)
    reconstruct_weights(job)
    assert output_error(job) < 0.7 * nearest
    for item in job.layers.values():
        codes = (item.layer.weight / item.grid.scale).round()
        down = torch.floor(item.weight / item.grid.scale)
        low, high = item.grid.qmin - item.grid.zero_point, item.grid.qmax - item.grid.zero_point
        inside = (down >= low) & (down + 1 <= high)
        assert ((codes == down) | (codes == down + 1))[inside].all()  # up or down, nothing else


def test_replayed_prefix_equals_running_it(monkeypatch):
    replayed, plain = make_job(iters=6), make_job(iters=6)
    reconstruct_weights(replayed)
    monkeypatch.setattr("dqbench.quant.reconstruct.disk_allows", lambda folder, size: False)
    reconstruct_weights(plain)
    for name, weight in weights(replayed).items():
        torch.testing.assert_close(weight, plain.layers[name].layer.weight, msg=name)


def conditional() -> UNet2DConditionModel:
    """A tiny text-conditional U-Net, its Transformer2DModels with one block each."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


def with_text(dtype: torch.dtype = torch.float32) -> CalibrationSet:
    """calibration() with 5 tokens of width 8 per row."""
    calib = calibration()
    text = torch.randn(len(calib), 5, 8, generator=torch.Generator().manual_seed(1))
    inputs = calib.rows(np.arange(len(calib)))
    return CalibrationSet.from_tensors(inputs["sample"].to(dtype), inputs["timestep"], encoder_hidden_states=text)


def conditional_job(units: tuple[str, ...], dtype: torch.dtype) -> Job:
    """A w3a4 job on the text-conditional U-Net."""
    teacher = conditional().to(dtype)
    student = copy.deepcopy(teacher)
    layers = prepare(student, select(student, Bits(3, 4, 4, 8), [], {}), WEIGHT, {})
    return Job(student, teacher, find_units(student, units, layers), layers, with_text(dtype), recon(iters=4), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["*.attentions.?", "*.transformer_blocks.?"])
def test_rows_of_a_conditional_network_are_those_of_an_unreplayed_pass(unit, dtype, tmp_path):
    job = conditional_job(("*.resnets.?", unit), dtype)
    order = job.order()
    assert sum("attentions" in name for name in order) >= 4
    replayed, plain = (Recorder(job.teacher, job.calib, tmp_path / str(on), on) for on in (True, False))
    for name in order:
        ours = replayed.inputs(name, tmp_path / "ours" / name, with_output=True)
        theirs = plain.inputs(name, tmp_path / "theirs" / name, with_output=True)
        replayed.remember(name, ours)
        assert ours.rows.arrays.keys() == theirs.rows.arrays.keys() and "output" in ours.rows.arrays
        for key, array in ours.rows.arrays.items():
            assert np.array_equal(array, theirs.rows.arrays[key]), (name, key)
    resumed = Recorder(job.teacher, job.calib, tmp_path / "resumed", True)
    resumed.remember_all(order[:-1])
    for key, array in resumed.inputs(order[-1], tmp_path / "last").rows.arrays.items():
        assert np.array_equal(array, theirs.rows.arrays[key])


@pytest.mark.parametrize("with_output", [True, False])
def test_a_resumed_recorder_rounds_as_one_that_was_never_killed(with_output, tmp_path):
    """The student's unit sees its inputs as they are on disk, the teacher's as they come; 8 rows show the layout."""
    pipe = load(OmegaConf.to_object(compose(["model=digits_ddpm"]).model))
    draw = torch.Generator().manual_seed(0)
    calib = CalibrationSet.from_tensors(torch.randn(8, 1, 8, 8, generator=draw), torch.arange(8) * 100)
    layers = prepare(pipe.unet, select(pipe.unet, Bits(4, 8, 8, 8), [], {}), WEIGHT, {})
    order = list(trace_units(pipe.unet, list(find_units(pipe.unet, pipe.anatomy.units, layers)), calib))

    def record(recorder: Recorder, names: list[str], folder: Path) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            call = recorder.inputs(name, folder / name, with_output)
            recorder.remember(name, call)
            found |= {f"{name} {key}": array for key, array in call.rows.arrays.items()}
        return found

    whole = record(Recorder(pipe.unet, calib, tmp_path / "whole", True), order, tmp_path / "inputs")
    for done in range(3, len(order), 4):
        resumed = Recorder(pipe.unet, calib, tmp_path / f"{done}", True)
        resumed.remember_all(order[:done], as_stored=not with_output)
        for key, array in record(resumed, order[done:], tmp_path / f"{done} inputs").items():
            assert np.array_equal(array, whole[key]), (done, key)


class Pair(nn.Module):
    """A unit that takes and returns a nest of per-row tensors, a constant as long as the batch, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, rest: tuple) -> tuple[Tensor, tuple]:
        side, table, nothing = rest
        return self.linear(x) * table.mean(0), ([side["side"] - x], table + 1, nothing)


class Chain(nn.Module):
    """Two such units in a row."""

    def __init__(self, table: Tensor, repeats: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.table, self.repeats = Pair(), Pair(), table, repeats

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sample = sample.repeat_interleave(self.repeats, 0)
        x, ([side], table, nothing) = self.first(sample, ({"side": sample * 2}, self.table, None))
        return self.second(x, ({"side": side}, table, nothing))[0]


def test_replay_gives_nested_outputs_back(tmp_path):
    torch.manual_seed(0)
    network = Chain(torch.randn(24, 4))
    calib = CalibrationSet.from_tensors(torch.randn(24, 4), torch.arange(24))
    rows = {}
    for replay in (True, False):
        recorder = Recorder(network, calib, tmp_path / str(replay), replay)
        recorder.remember("first", recorder.inputs("first", tmp_path / f"{replay} first"))
        rows[replay] = recorder.inputs("second", tmp_path / f"{replay} second", with_output=True).rows.arrays
    assert sorted(rows[True]) == ["input", "input[1]", "output", "output[1]"]  # no rows of the constant
    assert all(np.array_equal(values, rows[False][name]) for name, values in rows[True].items())


def test_what_cannot_be_recorded_by_rows_is_refused(tmp_path):
    torch.manual_seed(0)
    calib = CalibrationSet.from_tensors(torch.randn(24, 4), torch.arange(24))
    with pytest.raises(UserError, match=r"input: a tensor \[4, 4\] for 2 samples.*model.units"):
        Recorder(Chain(torch.randn(3, 4), repeats=2), calib, tmp_path, True).inputs("first", tmp_path)
    with pytest.raises(UserError, match="2 calibration samples"):
        Recorder(
            Chain(torch.randn(3, 4)), CalibrationSet.from_tensors(torch.randn(1, 4), torch.ones(1)), tmp_path, True
        )


def test_replay_runs_each_unit_once_per_row(tmp_path):
    job = make_job()
    order = job.order()
    forwards = {name: job.teacher.get_submodule(name).forward for name in order}
    recorder = Recorder(job.teacher, job.calib, tmp_path / "outputs", replay=True)
    for name in order:
        counted = count_calls(job.teacher.get_submodule(name))
        recorder.remember(name, recorder.inputs(name, tmp_path / name, with_output=True))
        assert counted == [1, 2, 24]  # two probes, then all rows in one pass
    with torch.no_grad():
        whole = job.teacher(**job.calib.rows(np.arange(24))).sample
    torch.testing.assert_close(torch.from_numpy(np.array(recorder.outputs.arrays["conv_out"])), whole)
    assert {name: job.teacher.get_submodule(name).forward for name in order} == forwards


def count_calls(unit: torch.nn.Module) -> list[int]:
    """The batch sizes of the unit's real forward passes from here on; a replayed unit's own layers do not run."""
    sizes: list[int] = []
    layer = next(module for module in unit.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear))
    layer.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    return sizes


def test_resume_after_each_unit_gives_the_same_weights(tmp_path):
    whole = make_job(iters=5)
    reconstruct_weights(whole)
    stopped = make_job(iters=5)
    part = tmp_path / "part"
    part.mkdir()
    with resuming(part):
        reconstruct_weights(stopped)
        finished = sorted((part / "scratch" / "weights").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in finished[len(finished) // 2 :]:
            path.unlink()
        times = {path: path.stat().st_mtime_ns for path in finished[: len(finished) // 2]}
        resumed = make_job(iters=5)
        reconstruct_weights(resumed)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, resumed.layers[name].layer.weight, rtol=0, atol=0, msg=name)


def test_official_order_is_the_given_one_and_execution_order_is_measured():
    patterns = [
        "time_embedding.*",
        "conv_in",
        "down_blocks.*",
        "mid_block.*",
        "up_blocks.1.*",
        "up_blocks.0.*",
        "conv_out",
    ]
    official, execution = make_job(patterns, order="official").order(), make_job().order()
    assert sorted(official) == sorted(execution)
    first_up = [next(name for name in order if name.startswith("up_blocks")) for order in (official, execution)]
    assert first_up == ["up_blocks.1.resnets.0", "up_blocks.0.resnets.0"]
    assert execution[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert execution[-1] == "conv_out"


def test_activation_phase_learns_steps_and_nothing_else():
    job = make_job(iters_act=40, lr_act=0.01)
    quantize_inputs(job.layers, signed=False)
    quantize_attention(job.student, Bits(3, 4, 4, 8), signed=False, signed_softmax=False)
    with calibrating(job.student, ACT):
        job.student(**job.calib.rows(range(16)))
    for scale in steps_of(job.student).values():
        scale *= 1.6  # coarser than best: something to learn
    before = {name: scale.clone() for name, scale in steps_of(job.student).items()}
    baked, error = weights(job), unit_error(job, "up_blocks.1.resnets.1")
    reconstruct_activations(job)
    after = steps_of(job.student)
    assert before.keys() == after.keys() and len(after) == len(act_quantizers(job.student))
    assert all(after[name] != before[name] and 0.5 <= after[name] / before[name] <= 2 for name in after)
    assert unit_error(job, "up_blocks.1.resnets.1") < 0.9 * error
    assert all(torch.equal(weight, job.layers[name].layer.weight) for name, weight in baked.items())
    assert not any(parameter.requires_grad for parameter in job.student.parameters())


def unit_error(job: Job, name: str) -> float:
    """The activation phase's loss of one unit over the calibration set."""
    with TemporaryDirectory() as folder, torch.no_grad():
        call = Recorder(job.teacher, job.calib, Path(folder), False).inputs(
            name, Path(folder, "unit"), with_output=True
        )
        args, kwargs = call.batch(slice(None), torch.device("cpu"))
        wanted = call.rows.read("output", slice(None), torch.device("cpu"))
        return (job.student.get_submodule(name)(*args, **kwargs) - wanted).abs().pow(2.4).sum(1).mean().item()


def test_dropout_is_active_only_when_asked_for():
    results = {}
    for dropout in (False, True):
        teacher = pipeline(dropout=0.5).unet
        student = copy.deepcopy(teacher)
        layers = prepare(student, select(student, Bits(3, 32, 32, 32), [], {}), WEIGHT, {})
        settings = recon(dropout=dropout, iters=4)
        job = Job(student, teacher, find_units(student, UNITS, layers), layers, calibration(), settings, ())
        state = torch.get_rng_state()
        reconstruct_weights(job)
        assert torch.equal(torch.get_rng_state(), state) and not student.training
        results[dropout] = weights(job)
    assert any(not torch.equal(results[False][name], results[True][name]) for name in results[True])


@pytest.mark.parametrize("count, beta", [(3, None), (4, 20.0), (12, 11.0), (20, 2.0)])
def test_beta_falls_linearly_after_the_warm_up(count, beta):
    class Rounder:
        beta = 0.0

    rounder = Rounder()
    set_beta([rounder], recon(iters=20), count)
    assert rounder.beta == (None if beta is None else pytest.approx(beta))


def test_trace_leaves_out_what_never_runs():
    unet = pipeline().unet
    unet.unused = torch.nn.Linear(2, 2)
    sizes = trace_units(unet, ["conv_out", "unused", "conv_in"], calibration())
    assert list(sizes.items()) == [("conv_in", 16 * 64 * 4), ("conv_out", 64 * 4)]


def test_nothing_is_left_on_disk(tmp_path):
    part = Path(tmp_path, "part")
    part.mkdir()
    with resuming(part):
        reconstruct_weights(make_job(iters=1))
    assert not list(part.rglob("*.npy"))


def test_a_missing_or_damaged_checkpoint_ends_the_resumed_prefix(tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    with resuming(part):
        whole = make_job(iters=3)
        reconstruct_weights(whole)
        (part / "scratch" / "weights" / "conv_in.safetensors").write_bytes(b"damaged")
        resumed = make_job(iters=3)
        reconstruct_weights(resumed)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, resumed.layers[name].layer.weight), name


def test_half_precision_learns_as_well_as_float32():
    """Grids, alphas, steps and losses are float32 whatever the network is."""
    overrides = ["recon.iters=10", "recon.iters_act=2", "recon.batch_size=8", "recon.act_init_samples=8"]
    method = build(compose(["method=qdiffusion", "recon.lr=0.03", *overrides]).method)
    errors, batch = {}, calibration(64, seed=1)
    with torch.no_grad():
        wanted = pipeline().unet(**batch.rows(range(64))).sample
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe, calib = pipeline(), calibration()
        pipe.unet.to(dtype)
        calib.dtype = batch.dtype = dtype
        unet = method(pipe, calib, Bits(4, 8, 8, 8)).unet
        assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
        assert {quantizer.scale.dtype for quantizer in act_quantizers(unet)} == {torch.float32}
        assert all(len(row.unique()) <= 16 for row in unet.mid_block.resnets[0].conv1.weight.flatten(1))
        with torch.no_grad():
            errors[dtype] = (unet(**batch.rows(range(64))).sample.float() - wanted).square().mean().item()
    assert errors.pop(torch.float32) == pytest.approx(errors[torch.bfloat16], rel=0.1)
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float16], rel=0.1)
