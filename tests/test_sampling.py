"""A sample depends on its seed alone; every scheduler runs; quadratic spacing and quantized operations are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from omegaconf import OmegaConf

from dqbench.calibration import CalibrationSet
from dqbench.config import build, compose
from dqbench.errors import UserError
from dqbench.models import UnconditionalPipeline, load
from dqbench.quant.functional import fake_quantize
from dqbench.sampling import generate, generators, sample_seed, set_sampler, to_uint8
from dqbench.schedulers import QuadDDIMScheduler, make_scheduler, quantize_operations
from tests.tiny import ddim, pipeline

SAMPLERS = [
    ddim(), ddim(eta=1.0), ddim(spacing="trailing"), ddim(spacing="quad", eta=0.5), ddim(scheduler="DDPMScheduler"),
    ddim(scheduler="DPMSolverMultistepScheduler", spacing="linspace"), ddim(scheduler="PNDMScheduler",
    kwargs={"skip_prk_steps": True}), ddim(scheduler="PNDMScheduler", steps=10),
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.scheduler}-{s.spacing}-{s.eta}-{s.steps}")
def test_a_sample_depends_on_its_seed_alone(sampler):
    pipe = pipeline(sampler=sampler)
    together = generate(pipe, sampler, [3, 4, 5])
    assert together.shape == (3, 8, 8, 1) and together.min() >= 0 and together.max() <= 1
    torch.manual_seed(99)  # the global generator plays no part
    apart = np.concatenate([generate(pipe, sampler, [seed]) for seed in (5, 3)])
    np.testing.assert_allclose(apart, together[[2, 0]], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_seeds_of_runs_do_not_overlap():
    assert sample_seed(0, 999_999) + 1 == sample_seed(1, 0)


def test_uint8_rounds():
    assert to_uint8(np.array([0.0, 0.5, 1.0, 0.0019, 0.002])).tolist() == [0, 128, 255, 0, 1]


def test_quad_spacing_is_the_releases_and_steps_between_those_t():
    scheduler = make_scheduler(
        dict(DDIMScheduler(num_train_timesteps=1000, clip_sample=False).config), ddim(100, spacing="quad")
    )
    assert isinstance(scheduler, QuadDDIMScheduler)
    scheduler.set_timesteps(100)
    t = scheduler.timesteps.tolist()
    assert len(set(t)) == 96 and t.count(0) == 4 and t[0] in (799, 800)
    # c1, c2 of DDIM's release, written out: x_prev = sqrt(a_p) x_0 + c2 eps + c1 z
    abar = torch.cumprod(1 - DDIMScheduler(num_train_timesteps=1000).betas, 0)
    x, eps, z = (torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    for eta in (0.0, 0.7):
        scheduler.set_timesteps(100)
        for k in range(5):
            a, a_prev = abar[t[k]], abar[t[k + 1]]
            c1 = eta * ((1 - a / a_prev) * (1 - a_prev) / (1 - a)).sqrt()
            x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            wanted = a_prev.sqrt() * x_0 + (1 - a_prev - c1**2).sqrt() * eps + c1 * z
            result = scheduler.step(eps, t[k], x, eta=eta, variance_noise=z).prev_sample
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_add_noise_is_not_changed_by_quad_spacing():
    plain = DDIMScheduler(num_train_timesteps=1000)
    quad = QuadDDIMScheduler.from_config(plain.config)
    quad.set_timesteps(10)
    x, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 700])
    assert torch.equal(quad.add_noise(x, noise, t), plain.add_noise(x, noise, t))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scheduler": "NoScheduler"}, "unknown"),
        ({"scheduler": "DPMSolverMultistepScheduler", "eta": 0.5}, "eta"),
        ({"scheduler": "PNDMScheduler", "spacing": "quad"}, "quad"),
        ({"steps": 101}, "100"),
    ],
)
def test_impossible_samplers_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        pipeline(sampler=ddim(**{"steps": 5} | changes))


@pytest.mark.parametrize("cls, eta", [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 0.0)])
def test_quantized_operations(cls, eta):
    plain = cls(num_train_timesteps=100, clip_sample=False)
    x, eps = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)

    def step(scheduler):
        scheduler.set_timesteps(10)
        extra = {"eta": eta} if cls is DDIMScheduler else {}
        generator = [torch.Generator().manual_seed(k) for k in range(3)]
        return scheduler.step(eps, 50, x, generator=generator, **extra).prev_sample

    exact = step(plain)
    torch.testing.assert_close(step(quantize_operations(plain, [], 4.0)), exact, rtol=1e-5, atol=1e-6)
    scale = torch.tensor(4.0 / 127)
    rounded = step(quantize_operations(plain, ["x"], 4.0))
    torch.testing.assert_close(rounded, fake_quantize(exact, scale, torch.zeros(()), -128, 127), rtol=0, atol=0.04)
    assert ((rounded / scale).round() * scale - rounded).abs().max() < 1e-5
    every = step(quantize_operations(plain, ["mu", "sigma", "x"], 4.0))
    assert 0 < (every - exact).abs().max() < 0.1
    with pytest.raises(UserError, match="DDIM and DDPM"):
        quantize_operations(QuadDDIMScheduler(), ["x"], 1.0)


def test_quantized_samples_are_bit_equal_for_every_batch_size():
    """One flipped code grows along the trajectory, so closeness is not enough: batches must round alike."""
    cfg = compose(["sampler.steps=6", "method=rtn", "bits=w4a8"])
    sampler = OmegaConf.to_object(cfg.sampler)
    pipe = set_sampler(load(OmegaConf.to_object(cfg.model)), sampler)
    rows = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calib = CalibrationSet.from_tensors(rows, torch.arange(0, 960, 15))
    quantized = build(cfg.method)(pipe, calib, OmegaConf.to_object(cfg.bits))
    seeds = list(range(96))
    for model in (pipe, quantized):
        together = generate(model, sampler, seeds)
        for size in (16, 64, 7):
            parts = [generate(model, sampler, seeds[k : k + size]) for k in range(0, 96, size)]
            assert np.array_equal(np.concatenate(parts), together), size


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_quantized_operations_know_every_variance_of_ddpm(variance_type):
    plain = DDPMScheduler(num_train_timesteps=100, variance_type=variance_type)
    torch.manual_seed(0)
    output, sample = torch.randn(2, 2 if "learned" in variance_type else 1, 8, 8), torch.randn(2, 1, 8, 8)
    if variance_type == "learned":
        output[:, 1] = output[:, 1].abs() * 0.01

    def step(scheduler):
        scheduler.set_timesteps(10)
        return scheduler.step(output, 50, sample, generator=generators([1, 2])).prev_sample

    torch.testing.assert_close(step(quantize_operations(plain, [], 4.0)), step(plain), rtol=1e-5, atol=1e-6)
    rounded = step(quantize_operations(plain, ["sigma"], 4.0))
    assert 0 < (rounded - step(plain)).abs().max() < 0.02  # half a step of 1/127 of the largest sigma, times z


class Careless(UnconditionalPipeline):
    """Steps without handing its generators on, on two stacked halves, as diffusers' DiTPipeline does."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps=50, output_type="np"):
        x = randn_tensor((len(generator), 1, 8, 8), generator=generator).repeat(2, 1, 1, 1)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
            x = x[: len(generator)].repeat(2, 1, 1, 1)
        return ImagePipelineOutput(self._images(x[: len(generator)], output_type))


def test_samples_are_seeded_where_the_pipeline_drops_its_generators():
    base = pipeline(sampler=ddim(scheduler="DDPMScheduler"))
    pipe = Careless(base.unet, base.scheduler)
    whole = generate(pipe, ddim(scheduler="DDPMScheduler", batch_size=32), range(20))
    parts = [
        generate(pipe, ddim(scheduler="DDPMScheduler", batch_size=32), range(first, first + 5))
        for first in range(0, 20, 5)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    assert whole.std(axis=0).mean() > 1e-3
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_that_loses_samples_is_an_error():
    class Short(UnconditionalPipeline):
        def _images(self, x_0, output_type):
            return super()._images(x_0, output_type)[1:]

    base = pipeline()
    with pytest.raises(RuntimeError, match="3 images for 4 seeds|returned"):
        generate(Short(base.unet, base.scheduler), ddim(), [1, 2, 3, 4])


@pytest.mark.parametrize(("spacing", "operations"), [("quad", []), ("leading", ["mu"])])
def test_eta_and_generators_reach_our_own_schedulers(spacing, operations):
    images = {}
    for eta in (0.0, 1.0):
        sampler = ddim(spacing=spacing, eta=eta)
        pipe = pipeline(sampler=sampler)
        if operations:
            pipe.scheduler = quantize_operations(pipe.scheduler, operations, 4.0)
        images[eta] = generate(pipe, sampler, [1, 2])
        np.testing.assert_allclose(generate(pipe, sampler, [2]), images[eta][1:], atol=1e-2)
    assert np.abs(images[0.0] - images[1.0]).max() > 0.05


def test_a_pipeline_with_a_scheduler_of_ours_is_saved_and_loaded(tmp_path):
    pipe = pipeline(sampler=ddim(spacing="quad"))
    pipe.save_pretrained(tmp_path)
    loaded = UnconditionalPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is QuadDDIMScheduler
