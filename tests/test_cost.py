"""cost.py and the model presets against figures measured on the authors' networks, and against arithmetic by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from omegaconf import OmegaConf
from torch import nn

from dqbench import cost as cost_module
from dqbench.architectures import build
from dqbench.config import Bits, Model, Sampler, compose, data_root
from dqbench.cost import cost, layers
from dqbench.errors import UserError
from dqbench.quant.plan import LAYER_TYPES, LayerBits, select, split

W4A8 = Bits(weight=4, act=8, attention=8, softmax=8)
FP32 = Bits(weight=32, act=32, attention=32, softmax=32)

# Measured on the networks of the authors' releases: parameters (M), GMAC of conv and linear, GMAC of attention matmuls.
PUBLISHED = {
    "ddpm_cifar10": (35.746, 6.054, 0.168),
    "ldm4_lsun_bedroom": (274.056, 96.02, 5.18),
    "ldm8_lsun_church": (294.967, 18.64, 2.28),
    "ldm4_imagenet": (400.92, 99.77, None),
    "sd14": (859.521, 338.6, 63.0),
}

# Reconstruction units of Q-Diffusion's release, weights only: ResNet blocks, attention or transformer blocks, layers.
UNITS = {
    "ddpm_cifar10": (22, 6, 10),
    "ldm4_lsun_bedroom": (22, 16, 10),
    "ldm8_lsun_church": (35, 21, 4),
    "sd14": (22, 16, 42),
}


@cache
def preset(name: str) -> Model:
    node = OmegaConf.load(data_root() / "conf" / "model" / f"{name}.yaml")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), node))


@cache
def network(name: str) -> nn.Module:
    return build(preset(name).architecture)


@cache
def bill(name: str) -> list[cost_module.LayerCost]:
    return layers(network(name), preset(name).inputs)


# PTQD keeps the first time linear, the first and the last conv at 8 bits.
PTQD_EIGHT = dict.fromkeys(("time_embedding.linear_1", "conv_in", "conv_out"), {"weight": 8, "act": 8})


class Toy(nn.Module):
    """[1, 2, 4, 4] -> [1, 5]: conv 3x3 (54 weights, 16 positions), norm, linear 3 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Linear(3, 5)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(sample)).mean((2, 3)))


class Crossed(nn.Module):
    """Cross-attention of 5 tokens of width 4 with 7 of width 6: 2 heads of width 3."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(query_dim=4, cross_attention_dim=6, heads=2, dim_head=3)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.attention(sample, encoder_hidden_states=context)


def toy_cost(bits: Bits = W4A8, plan: dict[str, LayerBits] | None = None) -> cost_module.Cost:
    toy = Toy()
    return cost(layers(toy, {"sample": [2, 4, 4]}), select(toy, bits, [], {}) if plan is None else plan, bits)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_the_released_networks(name: str) -> None:
    total = cost(bill(name), {}, FP32)
    found = (total.params / 1e6, total.macs / 1e9, total.macs_attention / 1e9)
    for value, published in zip(found, PUBLISHED[name], strict=True):
        assert published is None or value == pytest.approx(published, rel=5e-3)
    assert found[0] == pytest.approx(
        PUBLISHED[name][0], abs=5e-4 if name != "ldm4_imagenet" else 5e-3
    )  # to the digits given


@cache
def units(name: str) -> dict[str, nn.Module]:
    """Reconstruction units by definition: the outermost matches of the preset's patterns, then single layers."""
    found: dict[str, nn.Module] = {}
    for path, module in network(name).named_modules():
        is_unit = isinstance(module, LAYER_TYPES) or any(fnmatchcase(path, pattern) for pattern in preset(name).units)
        if is_unit and not any(path.startswith(f"{unit}.") for unit in found):
            found[path] = module
    return found


@pytest.mark.parametrize(("name", "counts"), UNITS.items())
def test_units_are_those_of_q_diffusion(name: str, counts: tuple[int, int, int]) -> None:
    kinds = Counter("layer" if isinstance(unit, LAYER_TYPES) else type(unit).__name__ for unit in units(name).values())
    attentions = kinds["Attention"] + kinds["BasicTransformerBlock"]
    assert (kinds["ResnetBlock2D"], attentions, kinds["layer"]) == counts
    assert len(units(name)) == sum(counts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_patterns_of_a_preset_match_and_order_every_unit(name: str) -> None:
    model = preset(name)
    names = [path for path, _ in network(name).named_modules()]
    for pattern in [*model.units, *model.shortcuts, *model.time_embedding]:
        assert any(fnmatchcase(path, pattern) for path in names), pattern
    for pattern in model.official_order:
        assert any(fnmatchcase(path, pattern) for path in units(name)), pattern
    if model.official_order:
        assert all(any(fnmatchcase(path, pattern) for pattern in model.official_order) for path in units(name))


def test_bops_of_papers() -> None:
    """ImageNet LDM-4 in T, the CIFAR-10 U-Net in G: fp32 and w4a8, each without and with attention matmuls."""
    assert cost(bill("ldm4_imagenet"), {}, FP32).bops_fp32 / 1e12 == pytest.approx(102.16, abs=0.005)
    cifar = cost(bill("ddpm_cifar10"), select(network("ddpm_cifar10"), W4A8, [], {}), W4A8)
    giga = (cifar.bops_fp32, cifar.bops_fp32_with_attention, cifar.bops, cifar.bops_with_attention)
    assert [round(value / 1e9) for value in giga] == [6199, 6371, 194, 204]


@pytest.mark.parametrize(
    ("skip", "ratio", "replaced"),
    [(["*.conv_shortcut"], 16.6, 268), (["*.conv_shortcut", "*.downsamplers.*"], 14.5, 265)],
)
def test_bops_ratio_of_ptqd_on_imagenet(skip: list[str], ratio: float, replaced: int) -> None:
    """The plain count of PTQD's layers: 265 of 283 in its release, its text counts the downsampling convs in."""
    plan = select(network("ldm4_imagenet"), W4A8, skip, PTQD_EIGHT)
    total = cost(bill("ldm4_imagenet"), plan, W4A8)
    assert total.bops_fp32 / total.bops == pytest.approx(ratio, abs=0.05)
    assert len(plan) == replaced


@pytest.mark.parametrize(("n_bits", "megabytes"), [(8, 429.7), (4, 234.1)])
def test_size_of_ptqd_on_imagenet(n_bits: int, megabytes: float) -> None:
    """PTQD: per-tensor weights, skip convs in full precision, first time linear and first and last conv at 8 bits."""
    net, bits = network("ldm4_imagenet"), replace(W4A8, weight=n_bits)
    plan = select(net, bits, ["*.conv_shortcut"], PTQD_EIGHT, granularity="per_tensor")
    assert cost(bill("ldm4_imagenet"), plan, bits).size_bytes / 1e6 == pytest.approx(megabytes, rel=1e-3)


def test_toy_by_hand() -> None:
    total = toy_cost()
    assert total.macs == 16 * 54 + 15
    assert total.params == 54 + 3 + 6 + 15 + 5
    assert total.bops == (16 * 54 + 15) * 4 * 8
    assert total.bops_fp32 == (16 * 54 + 15) * 32 * 32
    conv = 27 + 3 * 4 + 2 + 3 * 4 + 5  # codes, scales, 3 zero points of 4 bits, biases, activation scale and zero point
    linear = 8 + 5 * 4 + 3 + 5 * 4 + 5  # 15 codes and 5 zero points of 4 bits, rounded up
    assert total.size_bytes == conv + linear + 6 * 4
    assert total.size_bytes_fp32 == 4 * total.params
    assert total.bits_per_weight == 8 * (27 + 12 + 2 + 8 + 20 + 3) / (54 + 15)


@pytest.mark.parametrize("width", [32, 16])
def test_bits_that_mean_off_are_billed_as_the_32_they_are_stored_in(width: int) -> None:
    total = toy_cost(Bits(width, width, width, width))
    assert total.bops == total.bops_fp32 and total.bops_with_attention == total.bops_fp32_with_attention
    assert total.size_bytes == total.size_bytes_fp32  # no scales
    assert total.bits_per_weight == 32


def test_parts_of_a_plan_are_counted() -> None:
    """Weight-only, codebooks, and activation bits that vary over the steps."""
    plan = {"conv": LayerBits(weight=4, act=32, weight_groups=3, act_groups=1, weight_overhead_bits=17)}
    assert toy_cost(plan=plan).bops == 864 * 4 * 32 + 15 * 32 * 32
    assert toy_cost(plan=plan).size_bytes == (27 + 3 + 12 + 2 + 12) + (60 + 20) + 24
    plan = {"conv": replace(plan["conv"], act=7.2)}
    assert toy_cost(plan=plan).bops == round(864 * 4 * 7.2 + 15 * 32 * 32)


def test_attention_by_hand() -> None:
    found = layers(Crossed(), {"sample": [5, 4], "context": [7, 6]})
    macs = {(layer.name, layer.kind): layer.macs for layer in found}
    assert macs["attention", "attention_qk"] == macs["attention", "attention_sv"] == 5 * 7 * 6
    assert macs["attention.to_q", "linear"] == 5 * 4 * 6
    assert macs["attention.to_k", "linear"] == 7 * 6 * 6
    bits = Bits(weight=32, act=32, attention=8, softmax=4)
    total = cost(found, {}, bits)
    assert total.bops == total.bops_fp32
    assert total.bops_with_attention - total.bops == 210 * 8 * 8 + 210 * 4 * 8
    assert total.size_bytes - total.size_bytes_fp32 == 5 + 5 + 5 + 5  # q, k, v, softmax: scale and zero point each


def test_grouped_and_strided_conv() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv(sample)

    assert layers(Net(), {"sample": [4, 8, 8]})[0].macs == 4 * 4 * 6 * (4 // 2) * 9


def test_an_unseen_attention_is_an_error() -> None:
    class Explicit:
        def __call__(self, attn: Attention, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            return attn.to_out[0](attn.to_q(hidden_states))

    net = Crossed()
    net.attention.set_processor(Explicit())
    with pytest.raises(UserError, match="attention does not call"):
        layers(net, {"sample": [5, 4], "context": [7, 6]})


def test_loaded_and_meta_denoiser_cost_the_same() -> None:
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64]}
    config |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    loaded = UNet2DModel(**config)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert layers(loaded, {"sample": [1, 8, 8]}) == layers(
        build({"_class_name": "UNet2DModel", **config}), {"sample": [1, 8, 8]}
    )
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())


def test_select() -> None:
    toy, bits = Toy(), W4A8
    assert select(toy, bits, ["*"], {}) == select(toy, FP32, [], {}) == {}
    plan = select(toy, bits, ["lin*"], {"*": {"weight": 8}, "conv": {"act": 6}})
    assert plan == {"conv": LayerBits(weight=8, act=6, weight_groups=3, act_groups=1)}
    for how, groups in (
        (["per_tensor"], 1),
        (["per_group", 8], 3 * 3),
        (["per_group", 18], 3),
    ):  # 18 weights per channel
        assert select(toy, bits, [], {}, *how)["conv"].weight_groups == groups
    halves = split(plan, ["conv"])["conv"]
    assert (halves.weight_groups, halves.act_groups) == (6, 2)


def test_plan_of_a_configured_method() -> None:
    node = OmegaConf.structured(W4A8)

    def planned(**method: object) -> tuple[dict[str, LayerBits], Bits]:
        cfg = {
            "bits": node,
            "model": {"shortcuts": ["conv"]},
            "method": {"_target_": "dqbench.methods.rtn.RTN", "act": {}} | method,
        }
        return cost_module.plan_of(Toy(), OmegaConf.create(cfg))

    plan, bits = planned(skip=["linear"], split=True, attention=False, weight={"granularity": "per_tensor"})
    assert plan == {"conv": LayerBits(weight=4, act=8, weight_groups=2, act_groups=2)}
    assert (bits.attention, bits.softmax) == (32, 32)
    assert planned()[0] == select(Toy(), W4A8, [], {}) and planned()[1] == W4A8
    assert planned(act_site="output")[0]["conv"].act == 32  # what the matmul reads is not rounded
    assert planned(_target_=cost_module.FULL_PRECISION) == ({}, FP32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": {"conv": {"weight": 9}}}, "override conv: weight=9"),
        ({"overrides": {"conv": {"bits": 8}}}, "override conv: bits=8"),
        ({"granularity": "per_row"}, "granularity=per_row"),
        ({"granularity": "per_group"}, "needs a group_size"),
    ],
)
def test_bad_plans(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(Toy(), W4A8, **({"skip": [], "overrides": {}} | arguments))


@pytest.mark.parametrize(
    "architecture", [{}, {"_class_name": "DDIMScheduler"}, {"_class_name": "UNet2DModel", "sample_sise": 8}]
)
def test_bad_architectures(architecture: dict[str, object]) -> None:
    with pytest.raises(UserError, match="architecture"):
        build(architecture)


def test_the_command_prints_and_writes_the_same(monkeypatch, capsys, tmp_path) -> None:
    target = tmp_path / "cost.json"
    monkeypatch.setattr("sys.argv", ["cost", "model=ddpm_cifar10", "bits=w4a8", f"json={target}"])
    monkeypatch.setenv("COLUMNS", "160")
    cost_module.main()
    written, printed = json.loads(target.read_text()), capsys.readouterr().out
    assert written["model"] == "ddpm_cifar10" and written["total"]["macs"] == cost(bill("ddpm_cifar10"), {}, FP32).macs
    assert {layer["name"] for layer in written["layers"]} >= {
        "conv_in",
        "conv_out",
        "up_blocks.0.resnets.0.conv_shortcut",
    }
    assert all(layer["name"] in printed for layer in written["layers"])
    assert sum(layer["size_bytes"] for layer in written["layers"]) == written["total"]["size_bytes"]
    assert f"{written['total']['bops'] / 1e9:,.3f}" in printed


SAMPLERS = [
    path
    for path in sorted((data_root() / "conf" / "sampler").glob("*.yaml"))
    if not OmegaConf.load(path).scheduler.startswith("dqbench.text.")
]


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda path: path.stem)
def test_sampler_presets_drive_their_scheduler(path) -> None:
    from diffusers import DDPMScheduler

    from dqbench.schedulers import make_scheduler

    sampler = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sampler), OmegaConf.load(path)))
    scheduler = make_scheduler(dict(DDPMScheduler(num_train_timesteps=1000).config), sampler)
    scheduler.set_timesteps(sampler.steps)
    repeats = {"plms50": 1, "pndm50": 9}.get(path.stem, 0)  # forwards beyond one per step
    assert len(scheduler.timesteps) == sampler.steps + repeats
    assert all(scheduler.config[key] == value for key, value in sampler.kwargs.items())


def test_what_stays_in_half_precision_is_billed_at_16_bits() -> None:
    found, plan = layers(Toy(), {"sample": [2, 4, 4]}), select(Toy(), W4A8, ["linear"], {})
    full, half = (cost(found, plan, W4A8, dtype=dtype) for dtype in ("float32", "bfloat16"))
    kept = sum(layer.params for layer in found) - sum(layer.weights for layer in found if layer.name == "conv")
    assert full.size_bytes - half.size_bytes == 2 * kept and full.bits_per_weight == half.bits_per_weight
    assert half.size_bytes_fp32 == full.size_bytes_fp32 and "16 bits where not quantized" in half.convention


def test_the_bill_of_llada_is_that_of_its_published_parts() -> None:
    """6.979 G quantized parameters and 1.036 G of 16 bits; 2 planes with 16-bit scales in blocks of 128 columns."""
    cfg = compose(["model=llada_8b_base", "method=quant_dllm", "bits=w2a32", "model.inputs.input_ids=[16]"])
    total = cost_module.report(cfg)["total"]
    quantized = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    assert quantized == 6_979_321_856 and total["params"] - quantized == 1_036_259_328
    wide = 2 * (1 + 16 / 128 + 16 / 12288)
    square = 2 * (1 + 16 / 128 + 16 / 4096)
    assert round(square, 3) == 2.258 and wide < total["bits_per_weight"] < square
    assert total["size_bytes"] == pytest.approx(quantized * 2.255 / 8 + 2 * 1_036_259_328, rel=1e-3)


def test_a_bill_before_a_run_says_what_it_leaves_out() -> None:
    assert cost_module.notes(compose(["method=tfmq"])) == [cost_module.LATER]
    assert cost_module.notes(compose(["method=ptqd"]))[0] == cost_module.LATER
    assert cost_module.notes(compose(["method=qdiffusion"])) == []
