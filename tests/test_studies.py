"""The studies: rate and distortion beside the figures measured when the formats were chosen, and the iso-bits page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dqbench.errors import UserError
from dqbench.results import Row
from dqbench.studies import iso_bits, rate_distortion
from dqbench.studies.page import arguments

TENSORS = ("gauss", "laplace", "t3", "gauss, outlier channels", "gelu(2 gauss)", "silu(2 gauss) gauss")
ACTIVATIONS = {  # relative MSE, 512 x 4096; another draw of the heavy tails and of the outlier channels differs by more
    "INT8 per token": (7.6e-5, 2.1e-4, 1.8e-3, 3.6e-3, 1.3e-4, 5.5e-4),
    "INT4 per token": (0.0250, 0.0640, 0.289, 0.412, 0.0254, 0.0810),
    "INT4 g64": (0.0116, 0.0198, 0.0331, 0.0384, 0.0124, 0.0251),
    "INT4 g16": (0.0073, 0.0102, 0.0127, 0.0118, 0.0080, 0.0117),
    "MXFP4 g32": (0.0132, 0.0160, 0.0203, 0.0246, 0.0163, 0.0208),
    "NVFP4 g16": (0.0091, 0.0086, 0.0082, 0.0085, 0.0092, 0.0080),
    "QuaRTZ G16 truncate": (0.0437, 0.0515, 0.0498, 0.0284, 0.0350, 0.0422),
    "QuaRTZ G16 nearest": (0.0138, 0.0187, 0.0266, 0.0232, 0.0134, 0.0205),
    "QuaRTZ G16 midpoint": (0.0246, 0.0359, 0.0406, 0.0233, 0.0203, 0.0319),
    "QuaRTZ G32 truncate": (0.0549, 0.0703, 0.0766, 0.0446, 0.0451, 0.0601),
    "QuaRTZ G32 nearest": (0.0170, 0.0252, 0.0389, 0.0362, 0.0165, 0.0285),
}
BITS = (8, 4, 4.25, 5, 4.25, 4.5, 4.1875, 4.1875, 4.1875, 4.09375, 4.09375)
WEIGHTS = {  # gauss, t4; 512 x 2048
    "INT4 g128": (0.0138, 0.0376),
    "INT4 g64": (0.0116, 0.0259),
    "INT4 g32": (0.0094, 0.0174),
    "INT5 g128": (0.0030, 0.0084),
    "INT4 unclipped + 10% INT2, per channel": (0.0095, 0.0207),
    "INT4 clip 97 % + 1% INT4, per group": (0.0083, 0.0124),
    "INT4 clip 99 % + 1% INT4, per group": (0.0101, 0.0161),
    "INT8 unclipped + 1% INT4, per channel": (0.00004, 0.0001),
}
THEORY = {  # P(|q| >= 8), errors of LZS and of INT4 in steps of stage 1, share of F = 4
    "gauss": (0.82, 5.60, 4.53, 0.60),
    "laplace": (0.60, 3.58, 4.38, 0.20),
    "t3": (0.25, None, None, 0.03),
    "gauss, outlier channels": (0.04, 0.29, 2.67, 0.02),
    "gelu(2 gauss)": (0.38, 3.16, 2.95, 0.44),
    "silu(2 gauss) gauss": (0.21, None, None, None),
}


@pytest.fixture(scope="module")
def tensors():
    return rate_distortion.activations(rate_distortion.SEED)


def test_activation_anchors(tensors):
    found = rate_distortion.activation_points(tensors)
    for (form, errors), bits in zip(ACTIVATIONS.items(), BITS, strict=True):
        assert tuple(found[form]) == TENSORS
        for name, error in zip(TENSORS, errors, strict=True):
            digit = 10.0 ** -(4 if error >= 0.001 else 5)  # the last one given
            assert found[form][name].error == pytest.approx(error, rel=0.01, abs=digit), (form, name)
            assert found[form][name].bits == pytest.approx(bits, abs=16 / 4096 + 1e-9)


def test_theory_anchors(tensors):
    for name, found in rate_distortion.theory(tensors).items():
        own = (found.large, found.lzs, found.int4, found.flags[4])
        for value, expected in zip(own, THEORY[name], strict=True):
            assert expected is None or value == pytest.approx(expected, abs=0.006), name
        assert found.entropy > found.entropy_int4


def test_weight_anchors():
    found = rate_distortion.weight_points(rate_distortion.weights(rate_distortion.SEED))
    for form, errors in WEIGHTS.items():
        for point, error in zip(found[form].values(), errors, strict=True):
            digit = 10.0 ** -(4 if error >= 0.001 else 5)
            assert point.error == pytest.approx(error, rel=0.01, abs=digit), form
    residual, plain = (found[form]["t4"] for form in ("INT4 clip 97 % + 1% INT4, per channel", "INT4 g32"))
    assert residual.bits < 4.3 < plain.bits and residual.error < 0.8 * plain.error  # it pays on heavy tails
    residual, plain = (found[form]["gauss"] for form in ("INT4 unclipped + 10% INT2, per channel", "INT4 g32"))
    assert residual.bits > plain.bits and residual.error > plain.error  # and not where nothing is clipped


def test_draws_are_seeded_and_leave_the_generator_alone():
    import torch

    torch.manual_seed(5)
    first = rate_distortion.weights(0)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn) and torch.equal(rate_distortion.weights(0)["t4"], first["t4"])


def test_rate_distortion_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rate_distortion, "TOKENS", 8)
    monkeypatch.setattr(rate_distortion, "WEIGHTS", (8, 2048))
    monkeypatch.setattr(sys, "argv", ["rate_distortion", f"results={tmp_path}", f"json={tmp_path}/rd.json"])
    rate_distortion.main()
    page = (tmp_path / "tables" / "rate_distortion.md").read_text()
    assert "| QuaRTZ G16 nearest | 4.19 |" in page and "| NVFP4 g16 | 4.50 |" in page
    assert (tmp_path / "tables" / "rate_distortion.png").stat().st_size > 10_000
    assert str(tmp_path / "tables" / "rate_distortion.md") in capsys.readouterr().out
    content = json.loads((tmp_path / "rd.json").read_text())
    assert content["activations"]["MXFP4 g32"]["t3"]["bits"] == 4.25


def row(method: str, seed: int, bits: tuple[float, float], fd: float, psnr: float | None = None) -> Row:
    """A finished cell with these stored bits and metrics."""
    metric = {"low": 0.0, "high": 1.0, "n": 8, "extractor": "e", "protocol": "p", "higher_is_better": False}
    cost = {"bops": 1, "size_bytes": 1, "bits_per_weight": bits[0], "convention": "c"}
    cost |= {"bits_per_act": bits[1]} if bits[1] else {}
    config = {"method": {"name": method}, "seed": seed, "bits": {"weight": 4, "act": 4}, "model": {"name": "m"}}
    config["sampler"] = {"scheduler": "DDIMScheduler", "steps": 5, "num_samples": 8}
    paired = {} if psnr is None else {"psnr": metric | {"value": psnr}}
    return Row(f"{method}{seed}", config, {"fd_digits": metric | {"value": fd}}, {}, paired, cost, {}, {})


@pytest.fixture
def results(tmp_path):
    rows = [
        row("fp32", 0, (32.0, 32.0), 0.3), row("rtn", 0, (4.1, 4.0), 16.0, 15.0), row("rtn", 1, (4.1, 4.0), 18.0, 14.0),
        row("better", 0, (4.1, 4.0), 9.0, 20.0), row("more", 0, (4.5, 4.5), 8.0, 21.0),
        row("worse", 0, (5.0, 5.0), 8.5, 19.0), row("lean", 0, (4.5, 3.5), 12.0, 18.0),
        row("old", 0, (4.0, 0.0), 1.0, 30.0), row("tfmq_tiar", 0, (4.1, 4.0), 0.5, 40.0),
    ]  # fmt: skip
    for each in rows:
        each.write(tmp_path / "runs" / each.run_id)
    return tmp_path


def test_iso_bits_page(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["iso_bits", f"results={results}", f"json={results}/iso.json"])
    iso_bits.main()
    (page,) = capsys.readouterr().out.split()
    text = Path(page).read_text()
    assert "| rtn | w4a4 | 4.10 | 4.00 | 17.00 | 14.50 | 2 |  |" in text  # the mean of two seeds
    assert "| old | w4a4 | 4.00 | – | 1.000 |" in text
    (points,) = json.loads((results / "iso.json").read_text()).values()
    assert {point["method"] for point in points if point["front"]} == {"fp32", "better", "more", "lean"}


def test_iso_bits_without_rows_and_unknown_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["iso_bits", f"results={tmp_path}"])
    with pytest.raises(SystemExit):
        iso_bits.main()
    assert "holds no finished rows of quantized models" in capsys.readouterr().err
    with pytest.raises(UserError, match="seed=3 is not understood; allowed: results=DIR, json=PATH"):
        arguments(["seed=3"])
