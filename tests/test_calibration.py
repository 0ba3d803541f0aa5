"""Which rows calibrate: recorded along the trajectory, picked by policy, or taken from another source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ImagePipelineOutput, UNet2DConditionModel

from dqbench.arguments import call_inputs, flatten, nest
from dqbench.calibration import (
    CalibrationSet,
    calibration_seeds,
    pick,
    record_chains,
    record_trajectory,
    select,
)
from dqbench.config import Calib
from dqbench.errors import UserError
from dqbench.models import UnconditionalPipeline, anatomy
from dqbench.sampling import sample_seed
from dqbench.shards import Shards
from dqbench.sources import replace_source
from tests.tiny import ddim, pipeline


def calib(**changes) -> Calib:
    values = {
        "source": "trajectory", "policy": "uniform", "chains": 6, "steps": 2, "samples": 8, "mean": 0.4, "std": 0.4,
        "step": None, "official": False, "batch_size": 4, "mask": None,
    }  # fmt: skip
    return Calib(**values | changes)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trajectory")
    record_trajectory(pipeline(), ddim(), 6, lambda rows: calibration_seeds(rows, 0), folder)
    return folder


def test_trajectory_is_what_sampling_fed_the_network(trajectory):
    arrays = {name: Shards(trajectory, name).read() for name in ("sample", "timestep", "output")}
    assert arrays["sample"].shape == (6, 1, 5, 1, 8, 8)  # chains, guidance halves, steps, C, H, W
    assert arrays["timestep"][3, 0].tolist() == [80, 60, 40, 20, 0]
    pipe = pipeline()
    pipe.scheduler.set_timesteps(5)
    with torch.no_grad():
        sample = torch.from_numpy(arrays["sample"][:, 0, 2])
        predicted = pipe.unet(sample, torch.full((6,), 40)).sample
        following = pipe.scheduler.step(predicted, 40, sample).prev_sample
    torch.testing.assert_close(torch.from_numpy(arrays["output"][:, 0, 2]), predicted)
    torch.testing.assert_close(torch.from_numpy(arrays["sample"][:, 0, 3]), following)


def test_chains_do_not_depend_on_batch_size(trajectory, tmp_path):
    record_trajectory(pipeline(), ddim(batch_size=6), 6, lambda rows: calibration_seeds(rows, 0), tmp_path)
    for name in ("sample", "output"):
        np.testing.assert_allclose(Shards(tmp_path, name).read(), Shards(trajectory, name).read(), atol=1e-5)


def test_one_pass_records_every_step(monkeypatch):
    pipe, calls = pipeline(), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    record_chains(pipe, ddim(), [1, 2, 3], 0)
    assert len(calls) == 5


def test_calibration_seeds_are_disjoint_from_scored_seeds():
    assert not set(calibration_seeds(range(1000), 0)) & {sample_seed(0, i) for i in range(1000)}
    assert calibration_seeds(range(3), 0) != calibration_seeds(range(3), 1)


@pytest.mark.parametrize(
    "steps, kept, indices", [(100, 20, range(0, 100, 5)), (50, 25, range(0, 50, 2)), (500, 20, range(0, 500, 25))]
)
def test_uniform_keeps_every_cth_step(steps, kept, indices):
    chain, step = pick(calib(steps=kept, samples=kept * 4, chains=4), steps, 0)
    assert sorted(set(step.tolist())) == list(indices) and len(step) == kept * 4
    assert step[:4].tolist() == [0] * 4 and chain[:4].tolist() == [0, 1, 2, 3]  # step-major, noisiest first


def test_normal_policy_has_the_papers_clamped_shares():
    chain, step = pick(calib(policy="normal", samples=200_000), 250, 0)
    t = 249 - step
    assert abs((t == 0).mean() - 0.16) < 0.005 and abs((t == 249).mean() - 0.067) < 0.005
    inside = t[(t > 0) & (t < 249)]
    assert abs(np.median(inside) - 0.446 * 250) < 2  # median of N(0.4, 0.4) between 0 and 1
    official = pick(calib(policy="normal", samples=200_000, official=True), 250, 0)[1]
    assert (official == t).all()


def test_fixed_policy_is_one_step():
    assert set(pick(calib(policy="fixed"), 50, 0)[1]) == {25} and set(
        pick(calib(policy="fixed", step=7), 50, 0)[1]
    ) == {7}


def test_selected_rows_are_the_picked_ones(trajectory, tmp_path):
    settings = calib(policy="normal", samples=20)
    select(trajectory, settings, 0, tmp_path)
    chosen = CalibrationSet.open(tmp_path, 0)
    chain, step = pick(settings, 5, 0)
    sample = Shards(trajectory, "sample").read()
    assert len(chosen) == 20 and set(chosen.inputs) == {"sample", "timestep"}
    np.testing.assert_array_equal(chosen.rows(np.arange(20))["sample"], sample[chain, 0, step])
    np.testing.assert_array_equal(chosen.step, step)
    assert isinstance(chosen.inputs["sample"], np.memmap)


def test_official_ndtc_feeds_the_loop_counter(trajectory, tmp_path):
    select(trajectory, calib(policy="normal", samples=20, official=True), 0, tmp_path)
    chosen = CalibrationSet.open(tmp_path, 0)
    np.testing.assert_array_equal(chosen.inputs["timestep"], chosen.step)


@pytest.mark.parametrize("source", ["noise", "image", "train_mimic"])
def test_other_sources_replace_the_samples_only(trajectory, tmp_path, source):
    settings = calib(source=source, samples=200, steps=5)
    select(trajectory, settings, 0, tmp_path)
    before = np.load(tmp_path / "timestep.npy")
    pipe = pipeline()
    pipe.anatomy = replace(anatomy(pipe), data="digits")
    replace_source(pipe, settings, 0, tmp_path)
    rows, timestep = np.load(tmp_path / "sample.npy"), np.load(tmp_path / "timestep.npy")
    np.testing.assert_array_equal(timestep, before)
    early, late = rows[timestep == 80].std(), rows[timestep == 0].std()
    if source == "noise":
        assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05
    elif source == "image":
        assert rows.min() == -1 and rows.max() == 1 and len(np.unique(rows)) == 17
    else:  # q(x_t | x_0): nearly the images at t = 0, much of the noise at t = 80 of 100
        assert rows[timestep == 0].min() > -1.2 and early > 0.8 and late < 0.8


def test_real_images_needed_but_absent(trajectory, tmp_path):
    select(trajectory, calib(source="image"), 0, tmp_path)
    with pytest.raises(UserError, match="model.data"):
        replace_source(pipeline(), calib(source="image"), 0, tmp_path)


def test_own_tensors_make_a_set():
    chosen = CalibrationSet.from_tensors(
        torch.randn(4, 1, 8, 8), torch.tensor([9, 5, 9, 0]), class_labels=torch.arange(4)
    )
    assert chosen.step.tolist() == [0, 1, 0, 2] and set(chosen.rows([1])) == {"sample", "timestep", "class_labels"}
    with pytest.raises(UserError, match="N rows"):
        CalibrationSet.from_tensors(torch.randn(4, 1, 8, 8), torch.arange(3))


def test_conditions_are_recorded_whatever_way_they_are_passed():
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=6,
        attention_head_dim=4, )  # fmt: skip
    seen = {}
    unet.register_forward_hook(lambda m, a, k, o: seen.update(call_inputs(m, a, k)), with_kwargs=True)
    unet(torch.randn(2, 2, 4, 4), 7, encoder_hidden_states=torch.randn(2, 3, 6), return_dict=False)
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "sample": (2, 2, 4, 4), "timestep": (2,), "encoder_hidden_states": (2, 3, 6),
    }  # fmt: skip
    assert seen["timestep"].tolist() == [7, 7]


class Described(UnconditionalPipeline):
    """Hands conditions on in a dict, as SDXL's pipelines do."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps: int, output_type: str):
        x, pooled = (
            torch.cat([torch.randn(1, *shape, generator=one) for one in generator]) for shape in ((1, 8, 8), (5,))
        )
        added = {"text_embeds": pooled, "time_ids": torch.ones(len(x), 6)}
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, t, pooled[:, None, :4], added_cond_kwargs=added, return_dict=False)[0]
            x = self.scheduler.step(eps, t, x).prev_sample
        return ImagePipelineOutput(x.permute(0, 2, 3, 1).numpy())


def test_conditions_in_dicts_come_back_as_the_network_takes_them(tmp_path):
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=4,
        attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
    ).eval()  # fmt: skip
    pipe = Described(unet, pipeline().scheduler)
    record_trajectory(pipe, ddim(), 2, lambda rows: list(rows), tmp_path)
    (chosen := tmp_path / "chosen").mkdir()
    select(tmp_path, calib(chains=2, steps=5, samples=None), 0, chosen)
    rows = CalibrationSet.open(chosen, 0).rows(np.array([0, 1, 9]))
    assert rows["added_cond_kwargs"]["text_embeds"].shape == (3, 5) and set(rows) == {
        "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs",
    }  # fmt: skip
    output = torch.from_numpy(Shards(tmp_path, "output").read()[:, 0])
    torch.testing.assert_close(unet(**rows).sample, output[[0, 1, 1], [0, 0, 4]])
    assert flatten(nest({"a.b": 1, "a.c": 2, "d": 3})) == {"a.b": 1, "a.c": 2, "d": 3}
