"""Learned centroids: k-means, storage, reconstruction, time bins, equalization, bias correction, bit budgets."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from transformers import LlamaConfig

from dqbench.calibration import CalibrationSet
from dqbench.config import Bits, build, compose
from dqbench.cost import LayerCost, bytes_of, weight_bytes
from dqbench.errors import UserError
from dqbench.export import save_packed
from dqbench.load import from_packed
from dqbench.models import attach_anatomy, denoiser
from dqbench.quant.added_bias import channel_axis
from dqbench.quant.attach import find_units, installed
from dqbench.quant.bias_correction import icqbc, improve, learn_centroids, qbc
from dqbench.quant.centroid_acts import ActCentroids, BinnedQuantizer, RangeRule, Ranges, binned_quantizers, calibrate
from dqbench.quant.centroid_recon import Moments, objective, reconstruct
from dqbench.quant.checkpoint import load_denoiser, load_pipeline, save_denoiser, save_pipeline
from dqbench.quant.codebook import Codebook, Sharing, learn, nearest, unpack
from dqbench.quant.equalize import decoder_pairs, equalize, scales
from dqbench.quant.kmeans import exact_each, kmeans
from dqbench.quant.knapsack import allocate
from dqbench.quant.layerwise import visits
from dqbench.quant.lookahead import Lookahead, what_follows
from dqbench.quant.plan import LayerBits
from dqbench.quant.quantizers import SplitQuantizer
from dqbench.quant.sensitivity import SCORES, score
from dqbench.quant.storage import stored_bits
from dqbench.quant.storage import unpack as unpack_storage
from dqbench.quant.time_bins import TimeBins, at_bin, current, equal_mass_edges, find_clock
from dqbench.sampling import generate
from dqbench.text.networks import BidirectionalLlama
from dqbench.text.pipeline import MaskedDiffusionPipeline
from dqbench.text.schedulers import LLaDAScheduler
from tests.tiny import calibration, ddim, pipeline

MASK = 39
QUICK = ["method.weight.sweeps=1", "method.mixed.method=none", "method.bias.iters=2", "method.bias.rows=8"]


def method(*overrides: str):
    return build(compose(["method=quant_dllm_centroids", *QUICK, *overrides]).method)


def network(seed: int = 0) -> BidirectionalLlama:
    """Two decoder layers with 4 query heads on 2 key-value heads, random weights and gains."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, mask_token_id=MASK,
    )  # fmt: skip
    model = BidirectionalLlama(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.2, 3)
    return model.eval().requires_grad_(False)


def language_pipeline() -> MaskedDiffusionPipeline:
    pipe = MaskedDiffusionPipeline(network(), LLaDAScheduler(gen_length=8, block_length=8))
    pipe.set_progress_bar_config(disable=True)
    attach_anatomy(pipe, OmegaConf.to_object(compose(["model=text_mdlm"]).model))
    return pipe


def tokens(rows: int = 24, seed: int = 0) -> CalibrationSet:
    """Random ids, the last k / 8 of the 12 masked."""
    ids = torch.randint(0, MASK, (rows, 12), generator=torch.Generator().manual_seed(seed))
    for k, row in enumerate(ids):
        row[4 + k % 8 :] = MASK
    return CalibrationSet({"input_ids": ids.numpy()}, np.arange(rows) % 8)


def rules(**changes: RangeRule) -> ActCentroids:
    return replace(method().act, bins=1, **changes)


def squared_error(centroids, values, weights):
    found = centroids.gather(1, nearest(values, centroids).long())
    return (weights * (values - found).square()).sum(1)


# k-means and storage


def test_exact_kmeans_is_the_best_of_all_partitions():
    generator = torch.Generator().manual_seed(1)
    values, weights = (torch.rand(1, 9, generator=generator) for _ in range(2))
    x, order = values[0].sort()
    w = weights[0][order]

    def cell(i, j):
        return (w[i:j] * (x[i:j] - (w[i:j] * x[i:j]).sum() / w[i:j].sum()).square()).sum().item()

    cuts = ((0, *inner, 9) for inner in itertools.combinations(range(1, 9), 3))
    best = min(sum(cell(i, j) for i, j in itertools.pairwise(ends)) for ends in cuts)
    assert squared_error(exact_each(values, weights, 4), values, weights).item() == pytest.approx(best, rel=1e-4)


def test_kmeans_is_near_the_optimum_never_below_it_and_deterministic():
    generator = torch.Generator().manual_seed(2)
    values, weights = torch.randn(40, 64, generator=generator), torch.rand(40, 64, generator=generator)
    for k in (2, 4, 8):
        found, best = kmeans(values, weights, k), exact_each(values, weights, k)
        ratio = squared_error(found, values, weights) / squared_error(best, values, weights)
        assert (ratio > 1 - 1e-5).all() and ratio.median() < 1.4
        binned = squared_error(kmeans(values, weights, k, "bins"), values, weights)
        assert (binned / squared_error(best, values, weights)).median() < 1.02
        assert (found.diff(dim=1) >= 0).all() and torch.equal(found, kmeans(values, weights, k))
        shuffled = torch.randperm(64, generator=generator)
        torch.testing.assert_close(kmeans(values[:, shuffled], weights[:, shuffled], k), found)


def test_kmeans_uses_every_centroid_and_weighs_by_importance():
    values = torch.tensor([[0.0] * 30 + [5, 9, 20]])
    assert torch.equal(kmeans(values, torch.ones(1, 33), 4), torch.tensor([[0.0, 5, 9, 20]]))
    heavy = kmeans(torch.tensor([[0.0, 1, 10, 11]]), torch.tensor([[1.0, 0, 1, 3]]), 2)
    torch.testing.assert_close(heavy, torch.tensor([[0.0, 10.75]]))
    assert torch.equal(kmeans(torch.zeros(1, 3), torch.ones(1, 3), 4), torch.zeros(1, 4))
    assert torch.equal(exact_each(torch.full((1, 3), 7.0), torch.ones(1, 3), 4), torch.full((1, 4), 7.0))


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(1, 1), (7, 5), (5, 3, 3, 3), (6, 4, 3)]), n_bits=st.integers(2, 6),
    rows=st.integers(1, 9), columns=st.integers(1, 20), split=st.sampled_from([0, 2]),
)  # fmt: skip
def test_stored_weights_are_bit_equal_and_as_large_as_billed(shape, n_bits, rows, columns, split):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(n_bits))
    flat = weight.flatten(1)
    sharing = Sharing(rows, columns, min(split, flat.shape[1] - 1))
    book = learn(flat, torch.ones(flat.shape[1]), n_bits, sharing)
    storage = book.storage(weight)
    assert torch.equal(unpack_storage(storage.pack(), storage.header()), book.dequantize().reshape(shape))
    assert set(book.dequantize().flatten().tolist()) <= set(book.centroids.float().flatten().tolist())
    centroids = 16 * 2**n_bits * sharing.codebooks(*flat.shape)
    assert stored_bits(storage) == 8 * -(-weight.numel() * n_bits // 8) + centroids
    with pytest.raises(UserError, match="version"):
        unpack(storage.pack(), {**storage.header(), "version": 9})


def test_overhead_of_the_default_sharing():
    rule = method().weight
    assert [rule.overhead_bits((256, 256), b) / 256**2 for b in (2, 3, 4)] == [0.5, 0.25, 0.125]


def test_groups_start_anew_at_a_split():
    flat = torch.cat([torch.randn(4, 6), 100 + torch.randn(4, 6)], dim=1)
    book = learn(flat, torch.ones(12), 2, Sharing(4, 128, 6))
    assert book.centroids.shape == (1, 2, 4) and book.centroids[0, 0].max() < 50 < book.centroids[0, 1].min()


# layer reconstruction


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(20, 10), (50, 20)),
        (nn.Conv2d(6, 9, 3, padding=1, stride=2), (20, 6, 8, 8)),
        (nn.Conv1d(5, 4, 3, padding=2, dilation=2), (30, 5, 16)),
    ],
)
def test_moments_give_the_output_error_and_reconstruction_never_raises_it(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).cumsum(1)
    weight, y = layer.weight.detach().flatten(1), layer(x).detach()
    moments = Moments.zeros(layer)
    moments.add(layer, x, y)
    start = learn(weight, moments.second.diagonal().float(), 2, Sharing(3, 8))
    errors = []
    for sweeps in range(4):
        found = reconstruct(weight, moments, start, sweeps).dequantize()
        twin = copy.deepcopy(layer)
        twin.weight.data = found.reshape(layer.weight.shape)
        errors.append((twin(x) - y).double().square().sum().item())
        gap = objective(found, moments) - objective(weight, moments)
        assert errors[-1] == pytest.approx(gap.item(), rel=1e-3)
    assert errors[0] > 1.3 * errors[1] and all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


def test_reconstruction_mends_wrong_centroids_and_starts_from_what_matters():
    torch.manual_seed(8)
    x = torch.randn(200, 16)
    x[:, 0] *= 30
    layer = nn.Linear(16, 12)
    moments, weight = Moments.zeros(layer), layer.weight.detach()
    moments.add(layer, x, layer(x).detach())
    good = learn(weight, moments.second.diagonal().float(), 3, Sharing(12, 16))
    wrong = replace(good, centroids=good.centroids * 1.5)
    errors = [objective(reconstruct(weight, moments, own, 3).dequantize(), moments) for own in (good, wrong)]
    best = objective(weight, moments)
    assert errors[1] - best < 8 * (errors[0] - best)  # 58 times with codes alone
    rule = replace(method().weight, sweeps=0, rows={**method().weight.rows, "2": 12})
    plain, weighed = (rule.code(weight, 2, 0, own).dequantize() for own in (None, moments))
    assert (weighed - weight)[:, 0].norm() < 0.8 * (plain - weight)[:, 0].norm()


def test_each_layer_sees_what_earlier_ones_have_become_and_wants_what_full_precision_returns():
    teacher, rows = network(), tokens(70)
    student, seen, names = copy.deepcopy(teacher), {}, []
    for role, model in (("student", student), ("teacher", teacher)):
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, args, out, key=(role, name): seen.update({key: (args[0], out)}))
    linear = {name for name, layer in teacher.named_modules() if isinstance(layer, nn.Linear)}
    units = find_units(student, ["model.layers.?"], dict.fromkeys(linear))
    for visit in visits(student, teacher, units, rows):
        x, y = (torch.cat(parts) for parts in zip(*visit.pairs(), strict=True))
        student(**rows.rows(range(70))), teacher(**rows.rows(range(70)))
        torch.testing.assert_close(x, seen["student", visit.name][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(y, seen["teacher", visit.name][1], atol=1e-4, rtol=1e-4)
        visit.layer.weight.data *= 0.5
        names.append(visit.name)
    assert set(names) == linear and names[6] == "model.layers.0.mlp.down_proj" and names[-1] == "lm_head"


# activations and time


def test_ranges_are_percentiles_averaged_exponentially():
    rule = rules(uniform=RangeRule(99.0, "ema", 0.9), centroids=RangeRule(100.0, "all", 0.9))
    batches = [torch.arange(1001.0), torch.arange(1001.0) * 2, torch.arange(1001.0) - 5000]
    averaged = [0.9 * (0.9 * a + 0.1 * b) + 0.1 * c for a, b, c in ((10, 20, -4990), (990, 1980, -4010))]
    for centroids, (low, high) in ((False, averaged), (True, (-5000, 2000))):
        quantizer, watch = BinnedQuantizer(8, 1, centroids), Ranges(rule)
        for batch in batches:
            watch.see(quantizer, 0, batch)
        watch.finish(quantizer)
        assert quantizer.scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
        assert quantizer.zero_point.item() == round(-low / (high - low) * 255)


def test_centroids_of_activations_are_optimal_and_the_nearest_is_taken():
    quantizer = BinnedQuantizer(2, 1, centroids=True)
    quantizer.scale.fill_(0.5), quantizer.zero_point.fill_(100)
    quantizer.write(torch.tensor([[100, 101, 110, 200]]))
    x = torch.tensor([-3.0, 0.0, 0.2, 0.4, 2.6, 2.8, 5.1, 27.4, 27.8, 1e6])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 5.0, 5.0, 5.0, 50.0, 50.0])
    assert torch.equal(quantizer(x), expected)
    module = nn.ModuleDict({"q": quantizer})
    x = torch.cat([torch.randn(300), 20 + torch.randn(300)])[None]
    rule, calib = rules(centroids=RangeRule(100.0, "all", 0.0)), CalibrationSet({"x": x.numpy()}, np.zeros(1))
    module.forward = lambda x: quantizer(x)
    module.register_parameter("anchor", nn.Parameter(torch.zeros(1)))
    calibrate(module, calib, rule)
    grid = BinnedQuantizer(2, 1, centroids=False)
    grid.scale.copy_((x.max() - x.min().clamp(max=0)) / 3), grid.zero_point.copy_(-x.min() / grid.scale)
    assert (quantizer(x) - x).square().mean() < 0.5 * (grid(x) - x).square().mean()


def test_bins_have_equal_mass_and_unseen_times_the_nearest_bin():
    edges = equal_mass_edges(np.repeat([0.0, 10, 20, 30, 40, 50, 60, 70], 3), 4)
    assert edges == [15, 35, 55]
    assert equal_mass_edges(np.array([1.0, 1, 1, 2]), 4) == [1.5] and equal_mass_edges(np.ones(3), 4) == []
    bins = TimeBins.from_spec({"edges": edges, "measure": {"column": 0, "mask_id": None}, "inner": None})
    times = torch.tensor([[-100.0], [14], [16], [54], [56], [1e9]])
    assert bins(times) is times and current().rows == (0, 0, 1, 2, 3, 3)
    quantizer = BinnedQuantizer(8, 4, centroids=False)
    quantizer.scale.copy_(torch.tensor([1.0, 2, 4, 8]))
    assert torch.equal(quantizer(torch.full((6, 2), 9.0))[:, 0], torch.tensor([9.0, 9, 8, 8, 8, 8]))
    with at_bin(1):
        assert torch.equal(quantizer(torch.tensor([[5.2]])), torch.tensor([[6.0]]))


def test_language_models_tell_the_time_by_the_share_of_masks():
    result = method()(language_pipeline(), tokens(), Bits(32, 8, 32, 32))
    model = result.model
    clock = model.model.embed_tokens.act_quantizer
    assert isinstance(clock, TimeBins) and clock.count == 4
    ids = torch.full((3, 12), 5)
    ids[1, :5], ids[2] = MASK, MASK
    model(input_ids=ids)
    assert current().rows == tuple(np.searchsorted(clock.edges, [0, 5 / 12, 1]))
    alone = [model(input_ids=row[None]).logits for row in ids]
    torch.testing.assert_close(model(input_ids=ids).logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_the_clock_reads_what_grows_with_the_timestep(flip):
    network = nn.ModuleDict({"proj": Timesteps(32, flip, 0), "embedding": TimestepEmbedding(32, 64)})
    name, measure = find_clock(network)
    assert name == "embedding.linear_1"
    times = measure.times(network["proj"](torch.arange(0, 1000, 9)))
    assert (np.diff(times) > 0).all()


def test_image_models_tell_it_by_the_timestep_and_split_concatenations():
    unet = method()(pipeline(), calibration(), Bits(32, 8, 8, 8)).unet
    clock = unet.time_embedding.linear_1.act_quantizer
    assert clock.count == 4 and isinstance(clock.inner, BinnedQuantizer)
    seen = []
    for t in (80, 61, 60, 41, 20, 19, 0, 99):
        unet(torch.zeros(1, 1, 8, 8), t)
        seen.append(current().rows[0])
    assert seen[0] == seen[-1] == 3 and seen[-2] == 0 and seen[1] == seen[2] and seen[4] == seen[5]
    shortcut = unet.up_blocks[0].resnets[0].conv_shortcut.act_quantizer
    assert isinstance(shortcut, SplitQuantizer) and isinstance(shortcut.first, BinnedQuantizer)
    scale = unet.conv_out.act_quantizer.scale
    assert len(scale) == 4 and len(scale.unique()) > 1
    softmax = unet.mid_block.attentions[0].processor.quantizers["softmax"]
    assert softmax.scale == 1 / 255 and softmax.zero_point == 0


# equalization


def test_equalization_leaves_a_grouped_query_decoder_as_it_is():
    model, batch = network(), tokens(8).rows(range(8))
    before = model(**batch).logits
    pairs = list(decoder_pairs(model.model.layers[0]))
    assert (pairs[1].head, pairs[1].repeat) == (8, 2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert equalize(model) == 8
    after = model(**batch).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-5
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(scales(pairs[1]), torch.ones(16, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    attn = model.model.layers[0].self_attn
    columns = attn.o_proj.weight.abs().amax(0).reshape(2, 2, 8).amax(1).flatten()
    torch.testing.assert_close(attn.v_proj.weight.abs().amax(1), columns)


def test_equalization_of_conv_relu_conv_and_of_diffusers_attention():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 12, 12).double()
    before = chain(x)
    assert equalize(chain) == 1  # not through SiLU
    assert (chain(x) - before).norm() / before.norm() < 1e-12
    first, second = chain[0].weight.abs().amax((1, 2, 3)), chain[2].weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(first, second)
    unet, batch = pipeline().unet, calibration(8).rows(range(8))
    before = unet(**batch).sample
    assert equalize(unet, [unet.mid_block.attentions[0].to_q]) == equalize(unet) - 1
    assert (unet(**batch).sample - before).norm() / before.norm() < 1e-5


def test_an_equalized_network_is_compared_with_its_own_full_precision_twin():
    built, original = method(), network()
    student = copy.deepcopy(original)
    student.plan = built.plan(student, Bits(3, 32, 32, 32))
    assert method("method.equalize=false").balance(student, original) is original
    teacher, name = built.balance(student, original), "model.layers.0.mlp.up_proj"
    assert teacher is not student and not torch.equal(
        student.get_submodule(name).weight, original.get_submodule(name).weight
    )
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())


# bias correction


def attention_unit():
    """(unit, its first linear layer, calls, wanted, found): a nonlinear part after a linear layer with an error."""
    torch.manual_seed(5)
    unit = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)).requires_grad_(False)
    calls = [((torch.randn(20, 6),), {}), ((torch.randn(12, 6),), {})]
    wanted = torch.cat([unit[0](args[0]) for args, _ in calls])
    found = wanted - 0.3 - 0.4 * torch.randn_like(wanted) * wanted.abs()
    return unit, calls, wanted, found


def test_icqbc_at_lambda_0_is_qbc_exactly_and_looks_ahead_beyond_it():
    unit, calls, wanted, found = attention_unit()
    axis, following = channel_axis(unit[0]), what_follows(unit, unit[0], calls, lambda output: output)
    torch.testing.assert_close(following(wanted), torch.cat([unit(*args) for args, _ in calls]))
    plain = qbc(wanted, found, axis)
    torch.testing.assert_close((wanted - found - plain).mean(0), torch.zeros(8), atol=1e-6, rtol=0)
    assert torch.equal(icqbc(wanted, found, axis, following, strength=0.0, iters=10), plain)
    ahead = icqbc(wanted, found, axis, following, strength=10.0, iters=10)

    def error(shift):
        return (following(found + shift) - following(wanted)).square().sum()

    assert error(ahead) < 0.98 * error(plain)


def test_with_a_linear_layer_next_icqbc_is_qbc_for_any_lambda():
    unit, calls, wanted, found = attention_unit()
    linear = nn.Sequential(unit[0], unit[2])
    following = what_follows(linear, linear[0], calls, lambda output: output)
    ahead = icqbc(wanted, found, -1, following, strength=5.0, iters=20)
    torch.testing.assert_close(ahead, qbc(wanted, found, -1), atol=1e-4, rtol=1e-3)


def test_learned_centroids_lower_the_loss_that_looks_ahead():
    unit, calls, wanted, _ = attention_unit()
    book = learn(unit[0].weight, torch.ones(6), 2, Sharing(4, 6))
    student, x = copy.deepcopy(unit[0]), torch.cat([args[0] for args, _ in calls])
    book.install(student)
    loss = Lookahead.of(wanted, what_follows(unit, unit[0], calls, lambda output: output), 1.0)
    shift, index = qbc(wanted, student(x), -1)[None], torch.zeros(1, dtype=torch.long)
    alone = improve(shift, student(x), loss, index, -1, 20)
    before = loss(student(x) + alone)
    better = learn_centroids(student, book, x, loss, shift, index, 20)
    assert loss(student(x) + better) < 0.9 * before
    stored = unpack_storage(student.weight_storage.pack(), student.weight_storage.header())
    assert torch.equal(student.weight, stored) and (student.weight_storage.pack()["centroids"].diff(dim=2) >= 0).all()
    kept = student.weight.clone()
    assert torch.equal(learn_centroids(student, book, x, lambda output: 0 * output.sum(), shift, index, 2), shift)
    assert torch.equal(student.weight, kept)


def test_centroids_in_another_order_are_the_same_weights():
    book = learn(torch.randn(5, 9, generator=torch.Generator().manual_seed(6)), torch.ones(9), 2, Sharing(2, 4))
    swapped = replace(book, centroids=book.centroids.flip(2), codes=3 - book.codes)
    assert torch.equal(swapped.ordered().centroids, book.centroids)
    assert torch.equal(swapped.ordered().dequantize(), book.dequantize())


def first_errors(exact, models, batch):
    """Of the means of the first gate's outputs, over rows and tokens."""
    seen = []
    for model in (exact, *models):
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args[2].mean((0, 1))))
        model(**batch)
    return [(own - seen[0]).norm().item() for own in seen[1:]]


def test_bias_correction_reaches_layers_and_creates_biases_only_where_asked():
    pipe, rows = language_pipeline(), tokens()
    plain = method("method.bias.mode=qbc", "method.bias.create=false")(pipe, rows, Bits(2, 32, 32, 32)).model
    created = method("method.bias.mode=qbc", "method.bias.create=true")(pipe, rows, Bits(2, 32, 32, 32)).model
    assert plain.model.layers[0].self_attn.q_proj.bias is None
    assert {own.added_bias for own in plain.plan.values()} == {0}
    assert {own.added_bias for own in created.plan.values()} == {16, 32, 48}
    errors = first_errors(pipe.model, [plain, created], rows.rows(range(24)))
    assert errors[0] > 100 * errors[1]


def test_the_method_looks_ahead_as_its_switches_say():
    pipe, rows, name = language_pipeline(), tokens(), "model.layers.0.mlp.gate_proj"

    def made(*overrides):
        return method("method.bias.create=true", *overrides)(pipe, rows, Bits(2, 32, 32, 32)).model.state_dict()

    plain, none = made("method.bias.mode=qbc"), made("method.bias.strength=0", "method.bias.centroids=true")
    assert all(torch.equal(value, none[key]) for key, value in plain.items())
    ahead, learned = (made("method.bias.strength=5", f"method.bias.centroids={flag}") for flag in (False, True))
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(ahead[f"{first}.weight"], plain[f"{first}.weight"])
    assert not torch.equal(ahead[f"{first}.bias"], plain[f"{first}.bias"])
    assert not torch.equal(learned[f"{first}.weight"], plain[f"{first}.weight"])
    assert not torch.equal(ahead[f"{name}.bias"], plain[f"{name}.bias"])


def test_biases_per_bin_correct_the_mean_error_of_every_bin():
    """The mean over the rows of one bin; other rows of the batch have other bins."""
    pipe, rows = language_pipeline(), tokens(64)
    same, binned = (
        method("method.bias.mode=qbc", "method.bias.create=true", f"method.bias.per_bin={flag}")(
            pipe, rows, Bits(2, 32, 32, 32)
        ).model
        for flag in (False, True)
    )
    first = binned.model.layers[0].mlp.gate_proj
    assert first.bias is None and first.time_bias.shift.shape == (4, 48)
    assert binned.plan["model.layers.0.mlp.gate_proj"].added_bias == 4 * 48
    for k in range(4):
        batch = rows.rows(np.flatnonzero(rows.step // 2 == k))
        errors = first_errors(pipe.model, [same, binned], batch)
        assert errors[0] > 100 * errors[1]
    seen = []
    first.register_forward_hook(lambda *args: seen.append(args[2]))
    binned(**rows.rows(range(64)))
    for i in range(8):
        binned(**rows.rows([i]))
        torch.testing.assert_close(seen[-1][0], seen[0][i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_bin", [False, True])
@pytest.mark.parametrize("make", [pipeline, language_pipeline])
def test_added_biases_are_billed_saved_packed_and_loaded(make, per_bin, tmp_path):
    pipe, rows, bits = make(), (calibration() if make is pipeline else tokens()), Bits(3, 32, 32, 32)
    built = method("method.bias.create=true", f"method.bias.per_bin={per_bin}")
    result, batch = built(pipe, rows, bits), rows.rows(range(8))
    model = denoiser(result)
    numbers = sum(v.numel() for n, v in model.state_dict().items() if n not in denoiser(pipe).state_dict())
    assert numbers == sum(own.added_bias for own in model.plan.values())
    assert numbers > 0 or make is pipeline and not per_bin
    assert model.plan == built.plan(denoiser(pipe), bits)
    expected = model(**batch)[0]
    save_denoiser(result, tmp_path)
    save_packed(result, tmp_path / "packed")
    save_pipeline(result, tmp_path / "plain")
    for other in (load_denoiser(pipe, tmp_path), from_packed(tmp_path / "packed"), load_pipeline(tmp_path / "plain")):
        assert torch.equal(denoiser(other)(**batch)[0], expected)
        assert denoiser(other).plan == model.plan


def test_a_bill_counts_tables_with_activations_and_added_biases_with_the_weight():
    layer = LayerCost("x", "linear", 1000, 600, 10)
    plain = LayerBits(4, 4, 3, 2)
    more = replace(plain, act_table_bits=72, added_bias=30)
    bits = Bits(4, 4, 32, 32)
    assert bytes_of(layer, {"x": more}, bits) == bytes_of(layer, {"x": plain}, bits) + 9 + 4 * 30
    assert weight_bytes(layer, {"x": more}) == weight_bytes(layer, {"x": plain}) + 4 * 30
    assert weight_bytes(layer, {"x": more}, kept=2) == weight_bytes(layer, {"x": plain}) + 2 * 30
    assert LayerBits(**more.described()) == more and not {"act_table_bits", "added_bias"} & set(plain.described())


# bits


@given(
    sizes=st.lists(st.sampled_from([32, 48, 64, 100, 144, 256]), min_size=2, max_size=6),
    budget=st.sampled_from([2.0, 2.25, 2.5, 3.0, 3.5, 4.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_budgets_are_met_exactly_and_the_exact_method_is_the_best(sizes, budget, seed):
    random = np.random.default_rng(seed)
    losses = [dict(zip((2, 3, 4), sorted(random.exponential(size=3), reverse=True), strict=True)) for _ in sizes]
    every = list(itertools.product((2, 3, 4), repeat=len(sizes)))
    spent = {choice: sum(n * b for n, b in zip(sizes, choice, strict=True)) for choice in every}
    target = max(total for total in spent.values() if total <= budget * sum(sizes))
    assert target == budget * sum(sizes) or budget != round(budget)

    def loss(choice):
        return sum(own[b] for own, b in zip(losses, choice, strict=True))

    best = min(loss(choice) for choice, total in spent.items() if total == target)
    exact, greedy = (tuple(allocate(losses, sizes, budget, how)) for how in ("exact", "greedy"))
    assert spent[exact] == spent[greedy] == target
    assert loss(exact) == pytest.approx(best) and loss(greedy) >= loss(exact) - 1e-12


def test_greedy_raises_what_gains_most_per_bit_first():
    losses = [{2: 1.0, 3: 0.9, 4: 0.8}, {2: 9.0, 3: 8.0, 4: 7.0}, {2: 1.0, 3: 0.5, 4: 0.4}]
    assert allocate(losses, [10, 100, 10], 2 + 20 / 120, "greedy") == [3, 2, 3]
    assert allocate(losses, [10, 10, 10], 3, "greedy") == [2, 4, 3]


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(UserError, match="allowed here: 2 to 4"):
        allocate([{2: 1.0, 4: 0.0}], [10], 4.5, "exact")


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("make", [pipeline, language_pipeline])
def test_scores_fall_with_the_error_and_see_what_matters(kind, make):
    pipe = make()
    net, rows = denoiser(pipe), calibration(8) if make is pipeline else tokens(8)
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-4:]
    deltas = {name: {b: net.get_submodule(name).weight * 0.5**b for b in (2, 3, 4)} for name in names}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = list(rows.batches(batch_size=4))
    if kind == "kl" and make is pipeline:
        with pytest.raises(UserError, match="language model"):
            score(kind, net, deltas, batches, 0)
        return
    found = score(kind, net, deltas, batches, 0)
    if kind == "loo" and make is language_pipeline:  # sharper logits make the likely tokens likelier
        assert len({round(value, 9) for own in found.values() for value in own.values()}) == 12
    else:
        assert all(own[2] > own[3] > own[4] > 0 for own in found.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_fisher_is_the_sum_of_squared_jacobians():
    """Of a linear map y = W x: E[g^2] = sum over rows of x_j^2 for every output."""
    layer = nn.Linear(4, 3, bias=False)
    layer.config, x = None, torch.randn(6, 4)
    holder = nn.Sequential(layer)
    holder.config, holder.forward = None, lambda x: layer(x)
    deltas = {"0": {2: torch.ones(3, 4)}}
    found = [score("fisher", holder, deltas, [{"x": x}], seed)["0"][2] for seed in range(400)]
    assert np.mean(found) == pytest.approx(3 * x.square().sum().item(), rel=0.1)


# the method


@pytest.mark.parametrize(
    ("make", "rows", "bits"),
    [
        (pipeline, calibration, Bits(2, 4, 8, 8)),
        (language_pipeline, tokens, Bits(2, 4, 8, 8)),
        (language_pipeline, tokens, Bits(3, 8, 8, 8)),
    ],
)
def test_saved_and_loaded_outputs_are_equal_bit_for_bit(make, rows, bits, tmp_path):
    pipe, batch = make(), rows(8, seed=2).rows(range(8))
    result = method()(pipe, rows(), bits)
    save_denoiser(result, tmp_path)
    loaded = load_denoiser(pipe, tmp_path)
    (mine, *_), (other, *_) = (denoiser(own)(**batch).values() for own in (result, loaded))
    assert torch.equal(mine, other)
    assert installed(denoiser(loaded), bits) == installed(denoiser(result), bits)
    assert all(quantizer.watch is None for quantizer in binned_quantizers(denoiser(result)))
    if make is pipeline:
        assert np.array_equal(generate(loaded, ddim(), [1, 2]), generate(result, ddim(), [1, 2]))
    else:
        prompts = [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert torch.equal(*(p(prompts, output_type="pt", num_inference_steps=4).sequences for p in (result, loaded)))


def test_widths_and_bills():
    pipe = language_pipeline()
    built = replace(method(), overrides={"*.gate_proj": {"weight": 8}})
    result = built(pipe, tokens(), Bits(2, 4, 4, 8))
    plan, bits = installed(result.model, Bits(2, 4, 4, 8))
    expected = built.plan(pipe.model, Bits(2, 4, 4, 8))
    assert "lm_head" not in plan and plan.keys() == expected.keys() and bits.attention == 32
    down, up, gate = (plan[f"model.layers.0.mlp.{name}_proj"] for name in ("down", "up", "gate"))
    assert (down.act, up.act, gate.weight, up.weight) == (8, 4, 8, 2)
    assert up.weight_groups == 0 and gate.weight_groups == 48
    layer = result.model.model.layers[0].mlp.up_proj
    assert stored_bits(layer.weight_storage) == 2 * layer.weight.numel() + up.weight_overhead_bits
    assert up.act_table_bits == 8 * layer.act_quantizer.levels.numel() == 4 * 2**4 * 8 and down.act_table_bits == 0
    assert plan == expected


@pytest.mark.parametrize("how", ["greedy", "exact"])
def test_mixed_widths_keep_the_mean(how):
    built = method(f"method.mixed.method={how}", "method.mixed.rows=8")
    model = built(language_pipeline(), tokens(), Bits(3, 32, 32, 32)).model
    plan, sizes = model.plan, {name: model.get_submodule(name).weight.numel() for name in model.plan}
    assert sum(sizes[name] * own.weight for name, own in plan.items()) == 3 * sum(sizes.values())
    assert {own.weight for own in plan.values()} == {2, 3, 4}
    for name, own in plan.items():
        assert model.get_submodule(name).weight_storage.header()["bits"] == own.weight


def test_the_layer_that_matters_most_gets_most_bits(monkeypatch):
    matters = "model.layers.1.mlp.up_proj"

    def score(kind, network, deltas, batches, seed):
        return {name: {b: 0.5**b * (1000 if name == matters else 1) for b in own} for name, own in deltas.items()}

    monkeypatch.setattr("dqbench.quant.sensitivity.score", score)
    plan = method("method.mixed.method=exact")(language_pipeline(), tokens(), Bits(3, 32, 32, 32)).model.plan
    assert plan[matters].weight == 4 and 2 in {own.weight for own in plan.values()}


def test_reconstruction_pays():
    """On inputs outside of the calibration set, at 3 bits."""
    pipe, batch = language_pipeline(), tokens(64, seed=1).rows(range(64))

    def error(*overrides: str) -> float:
        found = method("method.bias.mode=none", "method.mixed.method=none", *overrides)(
            pipe, tokens(64), Bits(3, 32, 32, 32)
        ).model(**batch)
        return (found.logits - pipe.model(**batch).logits).square().mean().item()

    errors = error("method.weight.sweeps=2"), error("method.weight.sweeps=0")
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.bias.mode=x"], "none, qbc, icqbc"),
        (["method.bias.strength=-1"], "0 or more"),
        (["method.bias.mode=qbc", "method.bias.centroids=true"], "no effect"),
        (["method.bias.per_bin=true", "method.act.bins=1"], "2 or more bins"),
        (["method.mixed.score=x"], "fisher, hessian, loo, kl"),
        (["method.mixed.spread=0"], "1 or more"),
        (["method.act.uniform.percentile=101"], "50 to 100"),
        (["method.act.bins=0"], "1 to 256"),
        (["method.weight.columns=0"], "1 or more"),
        (["method.weight.rows.3=0"], "3 bits"),
    ],
)
def test_bad_values_are_one_clear_line(overrides, said):
    with pytest.raises(UserError, match=said) as error:
        method(*overrides)
    assert "\n" not in str(error.value)


def test_a_codebook_is_immutable_under_reconstruction():
    flat = torch.randn(4, 16)
    moments = Moments(torch.eye(16).double(), flat.double())
    start = learn(flat, torch.ones(16), 2, Sharing(1, 16))
    kept = replace(start, codes=start.codes.clone(), centroids=start.centroids.clone())
    found = reconstruct(flat, moments, start, 2)
    assert isinstance(found, Codebook) and torch.equal(start.codes, kept.codes)
    assert torch.equal(start.centroids, kept.centroids)
