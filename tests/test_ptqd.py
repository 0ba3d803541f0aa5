"""PTQD against known truth: a Gaussian denoiser that is exact, with an injected k, bias and residual."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ImagePipelineOutput,
    ModelMixin,
    PNDMScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from omegaconf import OmegaConf
from torch import Tensor, nn

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, Sampler, build, compose, data_root
from dqbench.correction import Switches, correct, corrected_class
from dqbench.errors import UserError
from dqbench.launching.checks import check
from dqbench.methods.ptqd import PTQD
from dqbench.models import UnconditionalPipeline, anatomy, attach_anatomy, clone, denoiser
from dqbench.noise_statistics import Statistics, collect, curves, estimate, residual_official, residual_paper, summary
from dqbench.quant import checkpoint
from dqbench.quant.clock import per_step, step_quantizers
from dqbench.quant.step_bits import Mixed, Range, by_range, fewest_bits
from dqbench.sampling import generate, set_sampler, steps_of
from dqbench.schedulers import QuadDDIMScheduler
from dqbench.shards import Shards
from dqbench.stages import resuming
from tests.tiny import ddim, pipeline

CONFIG = compose(["method=ptqd", "base=rtn"])
LDM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}  # LDM's schedule, t = 1 + 50 i
DATA_STD, K, RESIDUAL = 0.5, 0.08, 0.15
BIAS = (0.02, -0.03, 0.01)
ON, OFF = Switches(True, True, True, "paper"), Switches(False, False, False, "paper")


class Gaussian(ModelMixin, ConfigMixin):
    """E[noise | x_t] for data N(0, std^2), times 1 + k, plus a bias by channel and Gaussian noise."""

    @register_to_config
    def __init__(self, in_channels: int = 3, sample_size: int = 16, noisy: bool = False) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # diffusers asks for a device and a dtype
        self.generator = torch.Generator().manual_seed(0)
        self.alphas = DDIMScheduler(**LDM).alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        a = self.alphas[timestep]
        e = (1 - a).sqrt() / (a * DATA_STD**2 + 1 - a) * sample
        if self.config.noisy:
            bias = torch.tensor(BIAS).reshape(-1, 1, 1)
            e = (1 + K) * e + bias + RESIDUAL * torch.randn(e.shape, generator=self.generator)
        return UNet2DOutput(e)


class Quarter(ModelMixin, ConfigMixin):
    """A stand-in for a VAE that keeps samples within the range of images: x -> x / 4."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def decode(self, x: Tensor) -> UNet2DOutput:
        return UNet2DOutput(x / 4)


def toy(sampler: Sampler, noisy: bool) -> UnconditionalPipeline:
    scheduler = DDIMScheduler(**LDM, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = UnconditionalPipeline(Gaussian(noisy=noisy), scheduler, Quarter())
    pipe.set_progress_bar_config(disable=True)
    return set_sampler(pipe, sampler)


def final_std(pipe: UnconditionalPipeline, sampler: Sampler) -> float:
    return float(8 * (generate(pipe, sampler, range(192)) - 0.5).std())


def method(**changes: object) -> PTQD:
    """PTQD on RTN, four chains; `changes` of its config."""
    return build(OmegaConf.merge(CONFIG, {"method": {"chains": 4, **changes}}).method)


def seeds(rows: range) -> list[int]:
    return [1000 + i for i in rows]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """eta -> (sampler, full precision, quantized, folder with statistics of 1,024 chains)."""
    found = {}
    for eta in (1.0, 0.0):
        sampler = ddim(20, eta=eta, batch_size=64)
        full, quantized, folder = toy(sampler, False), toy(sampler, True), tmp_path_factory.mktemp("statistics")
        collect(full, quantized, sampler, 1024, seeds, folder)
        found[eta] = sampler, full, quantized, folder
    return found


@pytest.mark.parametrize("how, std", [("paper", 0.15), ("official", 0.1513)])  # official: the biases' spread leaks in
def test_injected_noise_is_recovered(toys, how, std):
    found = estimate(toys[1.0][3], how)
    assert found.timesteps.tolist() == [951.0 - 50 * i for i in range(20)]
    np.testing.assert_allclose(found.k, K, atol=0.006)
    np.testing.assert_allclose(found.std, std, atol=5e-4)
    np.testing.assert_allclose(found.bias, np.tile(BIAS, (20, 1)), atol=1.5e-3)
    assert np.abs(found.bias.mean(axis=0) - BIAS).max() < 0.001
    assert np.median(found.p_normal) > 0.05
    moments = Shards(toys[1.0][3], "moments").read().sum(axis=(0, 3))
    np.testing.assert_allclose(found.remaining(False, False), np.sqrt(moments[:, 5] / moments[:, 0]), rtol=0.01)
    np.testing.assert_allclose(found.remaining(True, True), std / (1 + K), rtol=0.01)
    variance = (K * found.signal) ** 2
    np.testing.assert_allclose(found.r2, variance / (variance + RESIDUAL**2 + np.var(BIAS)), atol=0.01)


def test_estimators_from_sums_are_those_of_the_tensors():
    n, c = 6, 3
    draw = torch.Generator().manual_seed(0)
    e = torch.randn(n, c, 8, 8, generator=draw).double() + torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    d = 0.3 * e + torch.randn(n, c, 8, 8, generator=draw) * torch.linspace(0.1, 0.5, n)[:, None, None, None]
    moments = summary(e, d, 7.0, [torch.Generator() for _ in range(n)])["moments"][:, None]
    residual = d - 0.3 * e
    bias, std = residual_paper(moments, np.array([0.3]))
    np.testing.assert_allclose(bias[0], residual.mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(std[0], residual.var(dim=(0, 2, 3), unbiased=False).mean().sqrt())
    bias, std = residual_official(moments, np.array([0.3]))
    np.testing.assert_allclose(bias[0], d.mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(std[0], residual.flatten(1).std(dim=1).mean())


def test_final_spread_at_eta_1(toys):
    sampler, full, quantized, folder = toys[1.0]
    statistics, plain = estimate(folder, "paper"), quantized.scheduler
    assert final_std(full, sampler) == pytest.approx(0.388, abs=0.004)
    assert final_std(quantized, sampler) == pytest.approx(0.352, abs=0.004)
    for form, wanted in (("paper", 0.387), ("official_master", 0.405)):
        quantized.scheduler = correct(plain, statistics, replace(ON, form=form))
        assert final_std(quantized, sampler) == pytest.approx(wanted, abs=0.004)
    quantized.scheduler = plain


def test_final_spread_at_eta_0(toys):
    sampler, full, quantized, folder = toys[0.0]
    assert final_std(full, sampler) == pytest.approx(0.432, abs=0.004)
    plain, quantized.scheduler = quantized.scheduler, correct(quantized.scheduler, estimate(folder, "paper"), ON)
    assert final_std(quantized, sampler) == pytest.approx(0.441, abs=0.004)
    quantized.scheduler = plain


def made(timesteps: Sequence[float], k: float = 0.0, bias: float = 0.0, std: float = 0.0) -> Statistics:
    ones = np.ones(len(timesteps))
    return Statistics(np.array(timesteps, float), k * ones, bias * ones[:, None], std * ones, ones, ones, ones)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("cls", [DDIMScheduler, QuadDDIMScheduler, DDPMScheduler])
def test_step_keeps_the_variance_of_the_full_precision_step(cls, clip):
    """x_{t-1} given x_t has the sampler's own variance although its prediction carries D': VSC's definition.

    Where x_0 is clipped, the error does not pass through it.
    """
    settings = {"num_train_timesteps": 100, "clip_sample": clip}
    plain, again = cls(**settings), cls(**settings)
    plain.set_timesteps(10)
    again.set_timesteps(10)
    t = plain.timesteps.tolist()
    std, k, eta = 0.2, 0.05, {} if cls is DDPMScheduler else {"eta": 1.0}
    corrected = correct(plain, made(t, k, std=std), ON)
    corrected.set_timesteps(10)
    rows = torch.Generator().manual_seed(0)
    x, e = torch.full((4000, 1, 4, 4), 1.5 if clip else 0.7), torch.full((4000, 1, 4, 4), 0.3)
    exact, absorbed = [], []
    for timestep in t[:-2]:
        predicted = (1 + k) * e + std * torch.randn(e.shape, generator=rows)
        own, wanted, ignored = (
            one.step(output, timestep, x, generator=rows, **eta).prev_sample.var().item()
            for one, output in ((corrected, predicted), (plain, e), (again, predicted / (1 + k)))
        )
        exact.append(own / wanted - 1)
        absorbed.append(ignored / wanted - 1)
    assert np.abs(exact).max() < 0.03, exact
    assert np.max(absorbed) > 0.03 or (clip and cls is DDPMScheduler), absorbed  # there it does not reach the mean


def test_where_the_sampler_adds_less_than_the_error_it_adds_nothing():
    plain = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    plain.set_timesteps(10)
    corrected = correct(plain, made(plain.timesteps.tolist(), std=30.0), ON)
    corrected.set_timesteps(10)
    x, e = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    first, second = (
        corrected.step(e, 90, x, eta=1.0, generator=torch.Generator().manual_seed(k)).prev_sample for k in (0, 1)
    )
    assert torch.equal(first, second)


SAMPLERS = [
    ddim(), ddim(eta=1.0), ddim(spacing="quad"), ddim(scheduler="DDPMScheduler"), ddim(scheduler="PNDMScheduler",
    kwargs={"skip_prk_steps": True}), ddim(10, scheduler="PNDMScheduler"), ddim(scheduler="DPMSolverMultistepScheduler",
    spacing="linspace"),
]  # fmt: skip


@pytest.fixture(scope="module", params=SAMPLERS, ids=lambda s: f"{s.scheduler}-{s.spacing}-{s.eta}-{s.steps}")
def perturbed(request, tmp_path_factory):
    """(sampler, full precision, perturbed, statistics) of the tiny pipeline."""
    sampler, folder = request.param, tmp_path_factory.mktemp("statistics")
    full = pipeline(sampler=sampler)
    other = clone(full)
    generator = torch.Generator().manual_seed(0)
    for weight in other.unet.parameters():
        weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator))
    collect(full, other, sampler, 6, seeds, folder)
    return sampler, full, other, estimate(folder, "paper")


def test_without_switches_samples_are_bit_identical(perturbed):
    sampler, _, other, statistics = perturbed
    plain, before = generate(other, sampler, [1, 2]), other.scheduler
    other.scheduler = correct(before, statistics, OFF)
    for _ in range(2):  # set_timesteps restarts the position
        assert np.array_equal(generate(other, sampler, [1, 2]), plain)
    other.scheduler = before


def test_corrected_schedulers_act_and_survive_disk(perturbed, tmp_path):
    sampler, full, other, statistics = perturbed
    assert statistics.timesteps.tolist() == steps_of(full).tolist()
    plain, before = generate(other, sampler, [1, 2]), other.scheduler
    vsc = sampler.scheduler in ("DDIMScheduler", "DDPMScheduler")
    shifted = replace(statistics, k=statistics.k + 0.3)
    other.scheduler = correct(before, shifted, replace(ON, vsc=vsc))
    samples = generate(other, sampler, [1, 2])
    assert np.abs(samples - plain).max() > 1e-3
    checkpoint.save_pipeline(other, tmp_path)
    loaded = checkpoint.load_pipeline(tmp_path)
    assert type(loaded.scheduler) is corrected_class(type(before))
    assert np.array_equal(generate(loaded, sampler, [1, 2]), samples)
    other.scheduler = before


def test_collection_follows_full_precision_and_compares_at_the_same_input(perturbed, tmp_path):
    sampler, full, other, _ = perturbed
    for name in ("none", "one"):
        (tmp_path / name).mkdir()
    collect(full, clone(full), sampler, 3, seeds, tmp_path / "none")
    same = estimate(tmp_path / "none", "paper")
    assert max(np.abs(values).max() for values in (same.k, same.std, same.bias)) < 1e-5
    inputs, errors = [], []

    def record(module, args, kwargs, output):
        inputs.append(args[0][0])
        errors.append((other.unet(*args, **kwargs).sample - output.sample)[0])

    handle = full.unet.register_forward_hook(record, with_kwargs=True)
    generate(full, sampler, seeds(range(1)))
    handle.remove()
    collect(full, other, sampler, 1, seeds, tmp_path / "one")
    found = estimate(tmp_path / "one", "official")
    np.testing.assert_allclose(found.bias[:, 0], [error.mean() for error in errors], rtol=1e-3, atol=1e-5)


def test_killed_collection_goes_on_and_ends_alike(tmp_path):
    sampler = ddim(batch_size=2)
    full, other = pipeline(sampler=sampler), pipeline(seed=1, sampler=sampler)
    asked = []

    def failing(rows: range) -> list[int]:
        asked.append(rows)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return seeds(rows)

    for folder in ("killed", "whole"):
        (tmp_path / folder).mkdir()
    with pytest.raises(KeyboardInterrupt):
        collect(full, other, sampler, 7, failing, tmp_path / "killed")
    collect(full, other, sampler, 7, failing, tmp_path / "killed")
    collect(full, other, sampler, 7, seeds, tmp_path / "whole")
    assert asked == [range(0, 2), range(2, 4), range(4, 6), range(4, 6), range(6, 7)]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_statistics_inside_a_stage_outlive_a_kill(tmp_path):
    pipe = pipeline()
    with resuming(tmp_path):
        first = method().statistics(pipe, pipeline(1), 0, "statistics-3-bits")
        kept = list((tmp_path / "scratch" / "statistics-3-bits").glob("moments.*"))
        second = method().statistics(pipe, pipe, 0, "statistics-3-bits")  # nothing left to collect: as the first
    assert kept and np.array_equal(first.std, second.std)


class Guided(UnconditionalPipeline):
    """Two stacked halves, the second at another time step, combined as guidance does: u + scale (c - u)."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps: int, guidance_scale: float, output_type: str):
        x = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            times = torch.cat([t.expand(len(x)), (t // 2).expand(len(x))])
            uncond, cond = self.unet(torch.cat([x, x]), times, return_dict=False)[0].chunk(2)
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x, return_dict=False)[0]
        return ImagePipelineOutput(x.permute(0, 2, 3, 1).numpy())


def test_statistics_are_those_after_guidance(tmp_path):
    sampler = ddim(guidance=3.0)
    full, other = (Guided(pipeline(seed).unet, pipeline().scheduler) for seed in (0, 1))
    full.sampler = sampler
    collect(full, other, sampler, 3, seeds, tmp_path)
    found = estimate(tmp_path, "official")
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds(range(3))])
    t = torch.tensor(80)

    def guided(unet: nn.Module) -> Tensor:
        uncond, cond = (unet(x, time).sample for time in (t, t // 2))
        return uncond + 3.0 * (cond - uncond)

    with torch.no_grad():
        e, d = guided(full.unet), guided(other.unet) - guided(full.unet)
    assert found.timesteps[0] == 80
    np.testing.assert_allclose(found.k[0], np.polyfit(e.flatten().double(), d.flatten().double(), 1)[0], rtol=1e-4)
    np.testing.assert_allclose(found.bias[0], d.mean(), rtol=1e-4)
    residual = (d - max(found.k[0], 0) * e).flatten(1)
    np.testing.assert_allclose(found.std[0], residual.std(dim=1).mean(), rtol=1e-4)


def test_negative_slope_is_clamped_at_use_only(tmp_path):
    sampler = ddim(batch_size=4)
    full, other = pipeline(sampler=sampler), pipeline(sampler=sampler)
    for parameter in other.unet.conv_out.parameters():
        parameter.data.mul_(0.9)  # e^ = 0.9 e: k = -0.1, D' = D
    collect(full, other, sampler, 4, seeds, tmp_path)
    found = estimate(tmp_path, "paper")
    np.testing.assert_allclose(found.k, -0.1, atol=1e-5)
    np.testing.assert_allclose(found.r2, 1, atol=1e-4)
    assert not found.slope.any() and found.std.min() > 0.01
    scheduler = correct(full.scheduler, found, replace(OFF, cnc=True))
    full_steps = generate(other, sampler, [1])
    other.scheduler = scheduler
    assert np.array_equal(generate(other, sampler, [1]), full_steps)


def test_positions_restart_skip_ahead_and_repeat():
    plain = PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True)
    plain.set_timesteps(5)
    t = plain.timesteps.tolist()
    assert len(t) > len(set(t))
    scheduler = correct(plain, replace(made(t), bias=np.arange(len(t))[:, None].astype(float)), replace(OFF, bc=True))
    scheduler.set_timesteps(5)
    assert [scheduler.noise_at(time).bias[0] for time in t] == list(range(len(t)))
    scheduler.set_timesteps(5)
    assert [scheduler.noise_at(time).bias[0] for time in t[3:]] == list(range(3, len(t)))


@pytest.mark.parametrize("cnc", [False, True])
@pytest.mark.parametrize("bc", [False, True])
def test_each_switch_acts_alone(cnc, bc):
    plain = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    plain.set_timesteps(5)
    known = replace(made(plain.timesteps.tolist(), k=0.25), bias=np.tile([0.5, -0.5], (5, 1)))
    scheduler = correct(plain, known, replace(OFF, cnc=cnc, bc=bc))
    scheduler.set_timesteps(5)
    x, predicted = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    bias = torch.tensor([0.5, -0.5]).reshape(2, 1, 1) * bc
    wanted = plain.step((predicted - bias) / (1 + 0.25 * cnc), 80, x).prev_sample
    torch.testing.assert_close(scheduler.step(predicted, 80, x).prev_sample, wanted)


def test_unknown_timestep_keeps_only_the_bias():
    plain = DDIMScheduler(num_train_timesteps=100)
    plain.set_timesteps(5)
    scheduler = correct(plain, made(plain.timesteps.tolist(), k=0.1, bias=0.2, std=0.3), ON)
    scheduler.set_timesteps(5)
    noise = scheduler.noise_at(77)
    assert (noise.k, list(noise.bias), noise.std) == (0, [0.2], 0)


def test_statistics_of_another_eta_or_guidance_are_refused():
    pipe = pipeline(sampler=ddim(eta=1.0))
    known = made([80, 60, 40, 20, 0], std=0.1)
    pipe.scheduler = correct(pipe.scheduler, known, ON, ddim(eta=1.0))
    assert np.isfinite(generate(pipe, ddim(eta=1.0), [1])).all()
    with pytest.raises(UserError, match="those of sampler.eta=1.0, not of 0.0"):
        generate(pipe, ddim(), [1])
    with pytest.raises(UserError, match="those of sampler.guidance=1.0, not of 3.0"):
        generate(pipe, ddim(eta=1.0, guidance=3.0), [1])
    with pytest.raises(UserError, match="those of sampler.eta=1.0, not of 0.5"):
        pipe([torch.Generator()], num_inference_steps=5, eta=0.5)


def test_a_learned_variance_is_not_corrected():
    plain = DDPMScheduler(num_train_timesteps=100, variance_type="learned_range", clip_sample=False)
    plain.set_timesteps(5)
    with pytest.raises(UserError, match="variance_type=learned_range"):
        correct(plain, made(plain.timesteps.tolist()), ON)
    scheduler = correct(plain, made(plain.timesteps.tolist(), k=0.1, bias=0.2), replace(ON, vsc=False))
    scheduler.set_timesteps(5)
    x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 2, 4, 4)
    own = scheduler.step(output, 80, x, generator=torch.Generator().manual_seed(0)).prev_sample
    exact = torch.cat([(output[:, :1] - 0.2) / 1.1, output[:, 1:]], dim=1)
    assert torch.equal(own, plain.step(exact, 80, x, generator=torch.Generator().manual_seed(0)).prev_sample)


def test_statistics_of_another_sampler_are_refused():
    pipe = pipeline()
    pipe.scheduler = correct(pipe.scheduler, made([80, 60, 40, 20, 0]), ON)
    with pytest.raises(UserError, match="another sampler, 5 steps from t=80 to t=0; this one takes 4 steps from t=75"):
        generate(pipe, ddim(4), [1])


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DPMSolverMultistepScheduler(), "vsc=true has a formula for DDIM and DDPM alone, not for DPMSolverMultistep"),
        (PNDMScheduler(), "not for PNDM"),
        (DDIMScheduler(prediction_type="v_prediction"), "predicts v_prediction, not epsilon"),
        (DDPMScheduler(prediction_type="sample"), "predicts sample, not epsilon"),
    ],
)
def test_what_has_no_formula_is_refused_in_one_line(scheduler, message):
    with pytest.raises(UserError, match=message) as raised:
        method().check(ddim(), scheduler)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "both"}, "allowed: paper, official_master"),
        ({"estimator": "median"}, "allowed: paper, official"),
        ({"chains": 0}, "method.chains=0"),
        ({"base": None}, "give one as base=, e.g. base=qdiffusion"),
        ({"mixed": {"mode": "some"}}, "allowed: none, ranges, rule"),
        ({"mixed": {"mode": "rule", "factor": 0}}, "factor"),
        ({"mixed": {"mode": "rule", "bits": []}}, "widths"),
        ({"mixed": {"mode": "ranges"}}, "widths"),
        ({"mixed": {"mode": "ranges", "ranges": [{"bits": 4, "first": 0, "last": 1.5}]}}, "overlap from 1 to 1.5"),
    ],
)
def test_nonsense_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        method(**changes)
    assert "\n" not in str(raised.value)


def test_negative_eta_is_refused():
    with pytest.raises(UserError, match="sampler.eta=-0.1 is out of range; allowed: 0 to 1"):
        check(OmegaConf.merge(CONFIG, {"sampler": {"eta": -0.1}}))


@pytest.mark.parametrize(
    "spans, message",
    [
        ([(4, 0, 0.5), (8, 0.4, 1)], "overlap from 0.4 to 0.5"),
        ([(4, 0, 0.5), (8, 0.6, 1)], "leave 0.5 to 0.6 uncovered"),
        ([(4, 0.1, 1)], "leave 0 to 0.1 uncovered"),
        ([(4, 0, 1), (8, 1, 1)], "covers no step"),
    ],
)
def test_ranges_cover_each_step_once(spans, message):
    with pytest.raises(UserError, match=message):
        Mixed("ranges", [4, 8], [Range(*span) for span in spans], 1.0)


@pytest.mark.parametrize(
    "name, steps, low",
    [("imagenet250", 250, 48), ("imagenet20", 20, 5), ("bedrooms200", 200, 45), ("churches200", 200, 54)],
)
def test_published_ranges(name, steps, low):
    preset = OmegaConf.load(data_root() / f"conf/method/mixed/{name}.yaml")
    ranges = method(mixed={"mode": preset.mode, "ranges": preset.ranges}).mixed.ranges
    assert by_range(ranges, steps) == [(4, list(range(low))), (8, list(range(low, steps)))]


def test_rule_takes_the_fewest_bits_that_are_enough():
    chosen = fewest_bits(
        {8: np.array([9, 9, 9, 1]), 4: np.array([5, 1, 1, 1]), 6: np.array([8, 8, 1, 1])}, np.full(4, 2)
    )
    assert chosen.tolist() == [4, 6, 8, 8]


def every_step(rows: int = 8) -> CalibrationSet:
    """Inputs at the five steps of ddim(); they grow towards the clean end."""
    step = torch.arange(5).repeat_interleave(rows)
    sample = torch.randn(5 * rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return CalibrationSet.from_tensors(sample * (1 + step)[:, None, None, None], 80 - 20 * step)


W4A4 = Bits(4, 4, 4, 8)


def test_bits_vary_over_the_steps_with_ranges_of_their_own_rows(tmp_path):
    pipe, calib = pipeline(), every_step()
    ranges = [{"bits": 3, "first": 0.0, "last": 0.4}, {"bits": 6, "first": 0.4, "last": 1.0}]
    built = method(mixed={"mode": "ranges", "ranges": ranges})
    base = built.base(pipe, calib, W4A4)
    mixed = built.refine(pipe, base, calib, W4A4)
    assert {own.act for own in denoiser(mixed).plan.values()} == {(2 * 3 + 3 * 6) / 5}
    assert {own.act for own in denoiser(base).plan.values()} == {4}
    assert {quantizer.widths for quantizer in step_quantizers(mixed.unet)} == {(3, 3, 6, 6, 6)}
    assert torch.equal(mixed.unet.conv_in.weight, base.unet.conv_in.weight)
    first, seen = mixed.unet.conv_in.act_quantizer, calib.inputs["sample"]
    for rows, position, width in ((slice(0, 16), 0, 3), (slice(16, 40), 4, 6)):
        span = seen[rows].max() - seen[rows].min()
        assert first.scale[position].item() == pytest.approx(span / (2**width - 1), rel=1e-5)
    levels = []
    mixed.unet.conv_in.register_forward_hook(lambda module, args, output: levels.append(len(args[0].unique())))
    samples = generate(mixed, ddim(), [1])
    checkpoint.save_denoiser(mixed, tmp_path)
    assert np.array_equal(generate(checkpoint.load_denoiser(pipe, tmp_path), ddim(), [1]), samples)
    assert all(count <= 2**width for count, width in zip(levels, (3, 3, 6, 6, 6), strict=True))


def test_layers_with_a_width_of_their_own_keep_it_at_every_step():
    pipe, calib = pipeline(), every_step()
    built = method(mixed={"mode": "ranges", "ranges": [{"bits": 3, "first": 0.0, "last": 1.0}]})
    built.base.overrides = {"conv_in": {"act": 8}}
    mixed = built.refine(pipe, built.base(pipe, calib, Bits(4, 8, 8, 8)), calib, Bits(4, 8, 8, 8))
    assert denoiser(mixed).plan["conv_in"].act == 8 and denoiser(mixed).plan["conv_out"].act == 3
    assert mixed.unet.conv_in.act_quantizer.n_bits == 8 and mixed.unet.conv_out.act_quantizer.widths == (3,) * 5


def test_mixed_precision_needs_quantized_activations_with_one_range_each():
    pipe, calib = pipeline(), every_step()
    built = method(mixed={"mode": "rule"})
    base = built.base(pipe, calib, W4A4)
    with pytest.raises(UserError, match="rule has no meaning with bits.act=32"):
        built.check_bits(Bits(4, 32, 32, 32))
    with pytest.raises(UserError, match="rule has no meaning with bits.act=32"):
        built.refine(pipe, base, calib, Bits(4, 32, 32, 32))
    per_step(base.unet, steps_of(pipe).tolist())
    with pytest.raises(UserError, match="rule has no meaning with the per-step ranges of base=rtn"):
        built.refine(pipe, base, calib, W4A4)


def test_rule_spends_bits_where_quantization_is_louder_than_the_forward_process():
    pipe, calib = pipeline(), every_step()
    base, widths = method().base(pipe, calib, W4A4), {}
    for factor in (1e-9, 0.1, 1e9):
        mixed = method(mixed={"mode": "rule", "bits": [8, 3], "factor": factor}).refine(pipe, base, calib, W4A4)
        (widths[factor],) = {quantizer.widths for quantizer in step_quantizers(mixed.unet)}
    assert widths[1e-9] == (3,) * 5 and widths[1e9] == (8,) * 5
    assert widths[0.1] == (3, 3, 3, 8, 8)  # SNR^Q of 3 bits is 0.7 to 0.8; SNR^F 1, 2, 5, 22, 10,000


def test_a_method_on_top_of_another_corrects_its_sampler_alone():
    pipe, calib = pipeline(sampler=ddim(eta=1.0)), every_step()
    built = method()
    own, base = built(pipe, calib, W4A4), built.base(pipe, calib, W4A4)
    pairs = zip(own.unet.state_dict().values(), base.unet.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert type(own.scheduler) is corrected_class(DDIMScheduler) and type(pipe.scheduler) is DDIMScheduler
    off = method(cnc=False, bc=False, vsc=False)
    assert off.correcting is None and off.refining is None
    assert type(off(pipe, calib, W4A4).scheduler) is DDIMScheduler


def test_curves_are_json_and_follow_the_schedule(perturbed):
    _, full, _, statistics = perturbed
    lists = json.loads(json.dumps(curves(statistics, full), allow_nan=False))
    assert {len(values) for values in lists.values()} == {len(statistics.k)}
    abar = full.scheduler.alphas_cumprod[int(statistics.timesteps[1])].item()
    assert lists["snr_forward"][1] == pytest.approx(abar / (1 - abar), rel=1e-5)
    error = 1 / np.array(lists["snr_quantized"])
    assert (error >= 1 / np.array(lists["snr_corrected"]) - 1e-9).all()


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_schedulers_that_set_their_timesteps_while_they_are_constructed_are_corrected(name):
    sampler = ddim(scheduler=name)
    pipe = pipeline(sampler=sampler)
    plain = generate(pipe, sampler, [1])
    timesteps = steps_of(pipe).tolist()
    for bias, same in ((0.0, True), (0.3, False)):
        twin = clone(pipe)
        twin.scheduler = correct(pipe.scheduler, made(timesteps, bias=bias), replace(ON, vsc=False))
        assert np.allclose(generate(twin, sampler, [1]), plain, atol=1e-5) == same


def test_variance_calibration_has_no_formula_for_thresholding():
    with pytest.raises(UserError, match="thresholding=true; allowed: method.vsc=false"):
        method().check(ddim(), DDIMScheduler(thresholding=True))
    method(vsc=False).check(ddim(), DDIMScheduler(thresholding=True))


def test_a_pipeline_class_that_converts_its_scheduler_keeps_the_corrected_one(tmp_path):
    tiny = pipeline()
    pipe = DDIMPipeline(tiny.unet, tiny.scheduler)
    attach_anatomy(pipe, replace(anatomy(tiny), pipeline="diffusers.DDIMPipeline"))
    pipe.sampler, pipe.unet.plan = ddim(), {}
    pipe.scheduler = correct(tiny.scheduler, made([80, 60, 40, 20, 0], bias=0.2), ON)
    checkpoint.save_pipeline(pipe, tmp_path)
    loaded = checkpoint.load_pipeline(tmp_path)
    assert type(loaded.scheduler).__name__ == "CorrectedDDIMScheduler"
    assert loaded.scheduler.config.correction["bias"] == [[0.2]] * 5
