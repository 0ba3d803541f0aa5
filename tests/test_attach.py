"""Layer types and state-dict keys survive; quantizers sit where the plan says; splits and units are found."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from dqbench.config import Bits
from dqbench.errors import UserError
from dqbench.quant.attach import (
    calibrating,
    find_units,
    installed,
    prepare,
    quantize_attention,
    quantize_inputs,
    rounding,
)
from dqbench.quant.attention import check_quantizable
from dqbench.quant.plan import select, split
from dqbench.quant.quantizers import ActRule, SplitQuantizer, WeightRule, act_quantizers, weight_grid
from dqbench.quant.shortcuts import skip_splits
from tests.test_reconstruct import conditional, with_text
from tests.tiny import calibration, pipeline

BITS = Bits(4, 8, 8, 8)
WEIGHT = WeightRule("per_channel", None, "minmax", False, False)
ACT = ActRule("minmax", False, "all", 0.0, True, False)


@pytest.fixture
def student() -> nn.Module:
    return pipeline().unet


def levels(weight: torch.Tensor) -> int:
    """The most distinct values that an output channel holds."""
    return max(len(row.unique()) for row in weight.flatten(1))


def test_prepare_bakes_plain_layers_on_the_grid(student):
    types = {name: type(layer) for name, layer in student.named_modules()}
    keys, untouched = list(student.state_dict()), student.conv_in.weight.clone()
    layers = prepare(student, select(student, BITS, ["conv_in"], {"conv_out": {"weight": 8}}), WEIGHT, {})
    assert set(student.state_dict()) == set(keys)
    assert {name: type(layer) for name, layer in student.named_modules()} == types
    assert "conv_in" not in layers and torch.equal(student.conv_in.weight, untouched)
    assert 16 < levels(student.conv_out.weight) <= 256
    assert all(levels(item.layer.weight) <= 16 for name, item in layers.items() if name != "conv_out")


def test_quantizers_add_keys_and_change_none(student):
    keys, types = set(student.state_dict()), {name: type(layer) for name, layer in student.named_modules()}
    layers = prepare(student, select(student, BITS, [], {}), WEIGHT, {})
    quantize_inputs(layers, signed=False)
    quantize_attention(student, BITS, signed=False, signed_softmax=False)
    with calibrating(student, ACT):
        student(**calibration().rows(range(8)))
    added = set(student.state_dict()) - keys
    assert keys <= set(student.state_dict())
    assert all("act_quantizer." in key or ".processor.quantizers." in key for key in added)
    assert all(type(student.get_submodule(name)) is kind for name, kind in types.items())
    assert len(act_quantizers(student)) == len(layers) + 4 * 4  # four attention modules
    assert all(quantizer.observer is None for quantizer in act_quantizers(student))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    batch = calibration().rows(range(4))
    assert torch.equal(twin(**batch).sample, student(**batch).sample)


def test_activations_are_on_their_grid(student):
    layers = prepare(student, select(student, Bits(32, 4, 32, 32), [], {}), WEIGHT, {})
    quantize_inputs(layers, signed=False)
    seen = {}
    with calibrating(student, ACT):
        student(**calibration().rows(range(8)))
    for name, item in layers.items():
        item.layer.register_forward_pre_hook(lambda layer, args, name=name: seen.update({name: args[0]}))
    student(**calibration(seed=1).rows(range(8)))
    assert seen and all(len(x.unique()) <= 16 for x in seen.values())


def test_softmax_keeps_zero_and_attention_off_leaves_the_processor(student):
    default = type(student.mid_block.attentions[0].processor)
    quantize_attention(student, Bits(4, 8, 32, 32), signed=False, signed_softmax=False)
    assert type(student.mid_block.attentions[0].processor) is default
    assert installed(student, BITS)[1] == Bits(4, 8, 32, 32)
    quantize_attention(student, BITS, signed=False, signed_softmax=False)
    with calibrating(student, ACT):
        student(**calibration().rows(range(8)))
    parts = student.mid_block.attentions[0].processor.quantizers
    assert parts["softmax"].zero_point == 0 and 0 < parts["softmax"].scale <= 1 / 255 + 1e-7
    assert installed(student, BITS)[1] == BITS


def test_quantized_attention_at_high_precision_equals_diffusers(student):
    teacher = copy.deepcopy(student)
    batch = calibration().rows(range(8))
    quantize_attention(student, BITS, signed=False, signed_softmax=False)
    for quantizer in act_quantizers(student):
        quantizer.qmin, quantizer.qmax = -(2**22), 2**22
        quantizer.scale.fill_(2.0**-20)
    torch.testing.assert_close(student(**batch).sample, teacher(**batch).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_quantized_cross_attention_equals_diffusers(masked):
    student = conditional()
    teacher = copy.deepcopy(student)
    batch = with_text().rows(range(8))
    if masked:
        mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5, 3, 2]).unsqueeze(1)
        batch["encoder_attention_mask"] = mask
        changed = {**batch, "encoder_hidden_states": torch.where(mask.unsqueeze(-1), batch["encoder_hidden_states"], 9)}
    wanted = teacher(**batch).sample
    quantize_attention(student, BITS, signed=False, signed_softmax=False)
    with calibrating(student, ACT):
        torch.testing.assert_close(student(**batch).sample, wanted)  # ACT.through: observed, not quantized
    error = (student(**batch).sample - wanted).abs().mean() / wanted.abs().mean()
    assert 0 < error < 0.01
    if masked:  # what is masked has no influence
        torch.testing.assert_close(student(**changed).sample, student(**batch).sample)


def make_attention(**changes) -> Attention:
    return Attention(16, heads=2, dim_head=8, **changes)


@pytest.mark.parametrize(
    "attn, reason",
    [
        (lambda: make_attention(qk_norm="rms_norm"), "normalizes q or k"),
        (lambda: make_attention(added_kv_proj_dim=4, processor=AttnProcessor()), "added projections"),
        (lambda: make_attention(kv_heads=1, processor=AttnProcessor2_0()), "fewer heads"),
        (lambda: make_attention(processor=JointAttnProcessor2_0()), "JointAttnProcessor2_0, not AttnProcessor"),
        (lambda: FluxAttention(16, heads=2, dim_head=8), "a FluxAttention, not"),
    ],
)
def test_attention_that_would_be_computed_as_something_else_is_refused(attn, reason):
    network = nn.ModuleDict({"plain": make_attention(norm_num_groups=2), "block": attn()})
    with pytest.raises(UserError, match=f"attention of block .*{reason}.*method.attention=false"):
        check_quantizable(network)
    check_quantizable(nn.ModuleDict({"plain": network["plain"], "scores": make_attention(processor=AttnProcessor())}))


def test_splits_are_the_first_operand_of_the_concatenation(student):
    splits = skip_splits(student, calibration().rows([0]), ["up_blocks.*.conv_shortcut"])
    assert splits == {
        "up_blocks.0.resnets.0.conv_shortcut": 32,
        "up_blocks.0.resnets.1.conv_shortcut": 32,
        "up_blocks.1.resnets.0.conv_shortcut": 32,
        "up_blocks.1.resnets.1.conv_shortcut": 16,
    }
    layers = prepare(student, split(select(student, BITS, [], {}), list(splits)), WEIGHT, splits)
    quantize_inputs(layers, signed=False)
    item = layers["up_blocks.1.resnets.1.conv_shortcut"]
    assert isinstance(item.layer.act_quantizer, SplitQuantizer)
    first = weight_grid(item.weight[:, :16], 4, WEIGHT)
    assert torch.equal(item.grid.scale[:, :1], first.scale) and not torch.equal(item.grid.scale[:, -1:], first.scale)


def test_per_group_scales_are_per_group():
    weight = torch.randn(4, 6, 1, 1) * torch.tensor([1.0, 1, 10, 10, 100, 100]).reshape(1, 6, 1, 1)
    grid = weight_grid(weight, 4, WeightRule("per_group", 2, "minmax", False, False))
    assert len(grid.scale.unique()) == 12 and grid.scale.shape == weight.shape
    assert torch.equal(grid.scale[:, 0], grid.scale[:, 1]) and (grid.scale[:, 4] > 3 * grid.scale[:, 2]).all()
    assert weight_grid(weight, 4, WeightRule("per_tensor", None, "minmax", False, False)).scale.numel() == 1


def test_units_are_outermost_matches_and_lone_layers(student):
    layers = prepare(student, select(student, BITS, ["conv_in"], {}), WEIGHT, {})
    units = find_units(student, ["*.resnets.?", "*.attentions.?"], layers)
    assert "conv_in" not in units
    assert units["conv_out"] == ["conv_out"] and units["time_embedding.linear_1"] == ["time_embedding.linear_1"]
    assert units["mid_block.attentions.0"] == [
        f"mid_block.attentions.0.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert sorted(name for members in units.values() for name in members) == sorted(layers)


def test_rounding_ends_hard_on_the_grid_even_after_an_error(student):
    layers = prepare(student, select(student, BITS, [], {}), WEIGHT, {})
    item = layers["conv_out"]
    keys = list(student.state_dict())
    with pytest.raises(RuntimeError), rounding([item], False) as (rounder,):
        soft = item.layer.weight
        assert (soft - item.weight).abs().median() < 1e-6  # soft rounding starts at the weight itself
        raise RuntimeError
    assert set(student.state_dict()) == set(keys) and type(item.layer) is nn.Conv2d
    codes = item.layer.weight / item.grid.scale + item.grid.zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-4) and codes.min() >= -1e-4 and codes.max() <= 15 + 1e-4


def test_the_bill_counts_only_quantizers_that_are_attached(student):
    layers = prepare(student, select(student, BITS, [], {}), WEIGHT, {})
    assert {bits.act for bits in installed(student, BITS)[0].values()} == {32}
    quantize_inputs({"conv_in": layers["conv_in"]}, signed=False)
    quantize_inputs({"conv_out": layers["conv_out"]}, signed=False, site="output")
    plan = installed(student, BITS)[0]
    assert plan["conv_in"].act == 8 and plan["conv_out"].act == 32
