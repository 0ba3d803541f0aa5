"""Released networks that need more than UnconditionalPipeline does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding

from dqbench.calibration import record_chains
from dqbench.config import Sampler
from dqbench.models import anatomy
from dqbench.pipelines import ClassConditionalPipeline, ClassEmbedding, EightHeadsPipeline, ImprovedPipeline
from dqbench.sampling import generate, set_sampler
from tests.tiny import ddim


def unet(channels: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=channels, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=16,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8,
    ).eval()  # fmt: skip


def conditional() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=1,
    )  # fmt: skip
    pipe = ClassConditionalPipeline(network.eval(), DDIMScheduler(), ClassEmbedding(num_classes=10, width=12))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize(("kind", "heads"), [(EightHeadsPipeline, 8), (ImprovedPipeline, 4)])
def test_heads_are_as_many_at_every_width(kind, heads):
    pipe = kind(unet(), DDPMScheduler())
    found = [module for module in pipe.unet.modules() if isinstance(module, Attention)]
    assert found and all(module.heads == heads for module in found)
    assert all(module.scale == (module.to_q.out_features / heads) ** -0.5 for module in found)


def test_improved_networks_see_a_thousand_steps_and_keep_their_variance_for_those_who_take_it():
    config = {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
    pipe = ImprovedPipeline(unet(channels=2), DDPMScheduler(**config))
    embedded = pipe.unet.time_proj(torch.tensor([3996]))
    expected = get_timestep_embedding(torch.tensor([999]), 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedded, expected)
    pipe.set_progress_bar_config(disable=True)
    for scheduler, spacing in (("DDPMScheduler", "leading"), ("DDIMScheduler", "linspace")):
        sampler = Sampler(scheduler, 4, 0.0, spacing, 1.0, 2, 2, {})
        set_sampler(pipe, sampler)
        images = generate(pipe, sampler, [0, 1])
        assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all() and images.std() > 0
    assert pipe.scheduler.timesteps.tolist() == [3999, 2666, 1333, 0]


def test_guidance_is_that_of_two_forwards_and_reads_the_class():
    pipe = conditional()
    one = pipe(generators(2), [3, 4], num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    other = pipe(generators(2), [3, 5], num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    x, t = torch.randn(1, 1, 8, 8), torch.tensor(500)
    tokens = {name: pipe.classes(torch.tensor([label])) for name, label in (("none", 10), ("class", 3))}
    none, given = (pipe.unet(x, t, encoder_hidden_states=tokens[name]).sample for name in ("none", "class"))
    seen = {}
    pipe.scheduler.step = lambda eps, t, x_t, **_: seen.setdefault("eps", eps) is None or stepped(x_t)
    pipe.scheduler.set_timesteps = lambda *_, **__: setattr(pipe.scheduler, "timesteps", t[None])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqbench.models.randn_tensor", lambda *_, **__: x)
        pipe(generators(1), [3], num_inference_steps=1, guidance_scale=3.0)
    torch.testing.assert_close(seen["eps"], none + 3 * (given - none))


def stepped(x_t: torch.Tensor) -> object:
    return type("Step", (), {"prev_sample": x_t})()


def test_a_class_conditional_folder_loads_and_its_trajectory_has_two_halves(tmp_path):
    conditional().save_pretrained(tmp_path)
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    sampler = ddim(guidance=3.0)
    set_sampler(pipe, sampler)
    pipe.anatomy = anatomy(pipe)
    pipe.anatomy.num_classes = 10
    found = record_chains(pipe, sampler, [0, 1, 2], 4)
    assert found["sample"].shape == (3, 2, 5, 1, 8, 8)
    tokens = pipe.classes(torch.tensor([4, 5, 6])).detach().numpy()
    np.testing.assert_array_equal(found["encoder_hidden_states"][:, 1, 0], tokens)
