"""Per-step quantizers follow the timestep, each step's parameters come from its own rows, and strangers are refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits
from dqbench.errors import UserError
from dqbench.quant.attach import attach_act_quantizer, prepare, quantize_attention, quantize_inputs
from dqbench.quant.clock import attach_clock, clock_of, held, per_step, step_quantizers, timesteps_of
from dqbench.quant.functional import fake_quantize
from dqbench.quant.plan import select
from dqbench.quant.quantizers import ActQuantizer, ActRule, WeightRule, act_quantizers
from dqbench.quant.ranges import choose_qparams
from dqbench.quant.running import FIRST_ROWS, RunningMinMax, calibrate_static, calibrate_steps
from tests.tiny import pipeline

STEPS = [80, 60, 40, 20, 0]
RULE = ActRule("minmax", False, "ema", 0.95, False, False)
SEARCH = replace(RULE, estimator="mse")


def rows(count: int = 6, steps: list[int] = STEPS) -> CalibrationSet:
    """`count` random rows of each step; they grow with the timestep."""
    timestep = torch.tensor(steps).repeat(count)
    noise = torch.randn(len(timestep), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calib = CalibrationSet.from_tensors(noise * (0.5 + timestep.reshape(-1, 1, 1, 1) / 20), timestep)
    calib.batch_size = 16
    return calib


@pytest.fixture(scope="module")
def static() -> nn.Module:
    """The tiny network with 4-bit activations everywhere, their ranges shared by all steps."""
    student, bits = pipeline().unet, Bits(32, 4, 4, 4)
    layers = prepare(
        student, select(student, bits, [], {}), WeightRule("per_channel", None, "minmax", False, False), {}
    )
    quantize_inputs(layers, signed=False)
    quantize_attention(student, bits, signed=False, signed_softmax=False)
    calibrate_static(student, rows(), RULE, RunningMinMax)
    return student


@pytest.fixture(scope="module")
def stepwise(static) -> nn.Module:
    student = copy.deepcopy(static)
    per_step(student, STEPS)
    calibrate_steps(student, rows(), RULE, RunningMinMax)
    return student


@torch.no_grad()
def forward(student: nn.Module, timestep, count: int = 4) -> torch.Tensor:
    sample = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return student(sample, timestep).sample


def test_turning_quantizers_into_per_step_ones_changes_nothing(static):
    student = copy.deepcopy(static)
    per_step(student, STEPS)
    assert len(step_quantizers(student)) == len(act_quantizers(student)) == len(act_quantizers(static))
    assert student.state_dict().keys() == static.state_dict().keys()
    assert all(torch.equal(forward(student, t), forward(static, t)) for t in STEPS)


def test_each_step_runs_with_its_own_parameters(static, stepwise):
    for position, timestep in enumerate(STEPS):
        twin = copy.deepcopy(static)
        for plain, own in zip(act_quantizers(twin), step_quantizers(stepwise), strict=True):
            plain.scale.copy_(own.scale[position])
            plain.zero_point.copy_(own.zero_point[position])
        for form in (timestep, torch.tensor(timestep), torch.full((4,), timestep)):
            assert torch.equal(forward(stepwise, form), forward(twin, timestep))
    scales = step_quantizers(stepwise)[0].scale
    assert scales[0] > 2 * scales[-1], "rows of noisier steps were larger"


def test_rows_of_one_batch_may_have_different_timesteps(static):
    student = copy.deepcopy(static)
    per_step(student, STEPS, n_bits=[3, 4, 5, 8, 8])
    calibrate_steps(student, rows(), RULE, RunningMinMax)
    each = [forward(student, t)[k] for k, t in enumerate(STEPS[:4])]
    torch.testing.assert_close(forward(student, torch.tensor(STEPS[:4])), torch.stack(each))


def test_only_the_named_layers_go_by_steps(static):
    student = copy.deepcopy(static)
    per_step(student, STEPS, names=["*.time_emb_proj", "mid_block.attentions.0"])
    layers = [n for n, m in student.named_modules() if n.endswith("time_emb_proj")]
    assert len(step_quantizers(student)) == len(layers) + 4
    before = {n: b.clone() for n, b in student.named_buffers() if n.endswith("scale") and not b.ndim}
    calibrate_steps(student, rows(), RULE, RunningMinMax)
    assert all(torch.equal(before[n], b) for n, b in student.named_buffers() if n in before)


def test_widths_differ_from_step_to_step_and_groups_share(static):
    student, widths = copy.deepcopy(static), [4, 4, 8, 8, 8]
    per_step(student, STEPS, n_bits=widths)
    calibrate_steps(student, rows(), RULE, groups=[[0, 1], [2, 3, 4]])
    seen: list[torch.Tensor] = []
    student.conv_out.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    for timestep, width in zip(STEPS, widths, strict=True):
        forward(student, timestep, 16)
        assert 2 ** (width - 1) < len(seen[-1].unique()) <= 2**width
    for quantizer in step_quantizers(student):
        assert len(quantizer.scale[:2].unique()) == len(quantizer.scale[2:].unique()) == 1
        assert quantizer.scale[0] > 4 * quantizer.scale[2]


def test_ranges_of_a_constant_batch_are_its_min_and_max(static):
    student, calib = copy.deepcopy(static), rows()
    per_step(student, STEPS, names=["conv_in"])
    values = np.array([3.0, -0.7, 2.0, -5.0, 0.1])
    calib.inputs["sample"] = np.broadcast_to(values[calib.step].reshape(-1, 1, 1, 1), (30, 1, 8, 8)).astype(np.float32)
    calibrate_steps(student, calib, SEARCH, RunningMinMax)
    quantizer = student.conv_in.act_quantizer
    for step, value in enumerate(values):
        low, high = min(value, 0), max(value, 0)
        assert quantizer.scale[step].item() == pytest.approx((high - low) / 15, rel=1e-6)
        assert quantizer.zero_point[step].item() == round(-low / ((high - low) / 15))


def test_running_ranges_start_searched_and_follow_with_the_momentum():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 8, generator=generator) + k for k in range(4)]
    observer = RunningMinMax(SEARCH, 3)
    for batch in batches:
        scale, zero_point = observer.observe(batch)
    start, middle = choose_qparams(batches[0].reshape(1, -1), 3, estimator="mse")
    low, high = -middle.item() * start.item(), (7 - middle.item()) * start.item()
    assert high - low < 0.9 * (batches[0].max() - batches[0].min()), "the search cuts the tails"
    for batch in batches[1:]:
        low, high = 0.95 * low + 0.05 * batch.min().item(), 0.95 * high + 0.05 * batch.max().item()
    assert scale.item() == pytest.approx((high - low) / 7, rel=1e-5)
    assert zero_point.item() == round(-low / ((high - low) / 7))


def test_copies_have_a_clock_of_their_own(stepwise):
    twin = pickle.loads(pickle.dumps(copy.deepcopy(stepwise)))
    assert clock_of(twin) is not clock_of(stepwise) and twin.conv_in.act_quantizer.clock is clock_of(twin)
    with held(clock_of(twin), 0):
        assert torch.equal(forward(twin, 20), forward(copy.deepcopy(twin), 20))
        assert not torch.equal(forward(twin, 20), forward(stepwise, 20))
    assert torch.equal(forward(twin, 20), forward(stepwise, 20)) and timesteps_of(twin) == STEPS


def test_strangers_are_refused_in_one_line(static, stepwise):
    with pytest.raises(UserError, match="timestep 41: .* another sampler, they know 5 from 80 to 0"):
        forward(stepwise, 41)
    with pytest.raises(UserError, match="another sampler"):
        attach_clock(copy.deepcopy(stepwise), [50, 0])
    with pytest.raises(UserError, match=r"no rows of 2 of the sampler's 5 steps \(timestep 60"):
        calibrate_steps(copy.deepcopy(stepwise), rows(steps=[80, 40, 0]), RULE)
    with pytest.raises(UserError, match="3 activation widths for 5 sampler steps"):
        per_step(copy.deepcopy(static), STEPS, n_bits=[4, 4, 8])


class Small(nn.Module):
    """A denoiser of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(sample) * 2


@torch.no_grad()
def test_all_steps_share_one_compiled_graph():
    model, graphs = Small(), []
    attach_act_quantizer(model.layer, ActQuantizer(4, False), "input")
    per_step(model, STEPS)
    quantizer, x = step_quantizers(model)[0], torch.randn(4, 8)
    quantizer.write(range(5), torch.arange(1.0, 6) / 10, torch.arange(5.0, 0, -1))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for k, timestep in enumerate(STEPS):
        exact = fake_quantize(x, torch.tensor((k + 1) / 10), torch.tensor(5.0 - k), 0, 15)
        wanted = 2 * nn.functional.linear(exact, model.layer.weight, model.layer.bias)
        torch.testing.assert_close(compiled(x, torch.tensor(timestep)), wanted)
    assert len(graphs) == 1


def test_a_rule_of_the_first_batch_sees_as_many_rows_of_each_step_as_start_ranges_elsewhere(static):
    student, calib = copy.deepcopy(static), rows(FIRST_ROWS + 9)
    per_step(student, STEPS, names=["conv_in"])
    seen = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["sample"])), with_kwargs=True)
    calibrate_steps(student, calib, replace(SEARCH, over="first"))
    assert seen == [FIRST_ROWS] * len(STEPS)
