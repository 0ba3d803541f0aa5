"""Metrics against the libraries' own entry points, closed forms, and every way in which scoring can be refused."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from cleanfid import fid as cleanfid_fid
from omegaconf import OmegaConf
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.utils import create_feature_extractor

from dqbench.config import build, data_root
from dqbench.errors import UserError
from dqbench.metrics import clean_fid, extractors
from dqbench.metrics.base import Metric, Scorer, difference, mean_interval, t_95
from dqbench.metrics.guards import DegenerateSamples, check_samples
from dqbench.metrics.images import ArrayImages
from dqbench.metrics.measure import Kind, Panel, Statistic, resample
from dqbench.metrics.paired import paired
from dqbench.zoo.data import digits_uint8

CONFIGS = sorted((data_root() / "conf" / "metrics").glob("*.yaml"))
REFUSED = {  # what of which is not here
    "inception": r"weights-inception-2015-12-05.*metrics.weights=PATH",
    "adm": r"weights-inception-2015-12-05.*metrics.weights=PATH",
    "clean_fid": r"inception-2015-12-05.*metrics.weights=PATH",
    "lm_eval": r"pip install 'dqbench\[eval\]'",
}
TORCH_FIDELITY_KEYS = {
    "fd_digits": "frechet_inception_distance",
    "kd_digits": "kernel_inception_distance_mean",
    "precision_digits": "precision",
    "recall_digits": "recall",
    "is_digits": "inception_score_mean",
}


def scorer(name: str, **overrides: object) -> Scorer:
    node = OmegaConf.load(data_root() / "conf" / "metrics" / f"{name}.yaml")
    for key, value in overrides.items():
        OmegaConf.update(node, key.replace("__", "."), value)
    return build(node)


def quick(**overrides: object) -> Scorer:
    """The digits metrics with few resamples."""
    names = ("frechet", "spatial", "kernel", "manifold", "inception_score", "confident")
    return scorer("digits", **{f"statistics__{name}__bootstrap": 3 for name in names}, **overrides)


def noisy_digits(count: int, noise: int, seed: int = 0) -> np.ndarray:
    """Real digits with uniform noise: [count, 8, 8, 1] uint8."""
    rng = np.random.default_rng(seed)
    images = digits_uint8().permute(0, 2, 3, 1).numpy()[rng.permutation(1797)[:count]].astype(int)
    return np.clip(images + rng.integers(-noise, noise + 1, images.shape), 0, 255).astype(np.uint8)


def save_images(images: np.ndarray, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{index:05d}.png")
    return folder


# digits --------------------------------------------------------------------------------------------------------------


def test_digits_metrics_are_what_torch_fidelity_computes(tmp_path):
    images = noisy_digits(600, noise=30)
    extractors.register()
    options = {"feature_extractor": "digits-classifier", "kid_subsets": 4, "kid_subset_size": 512, "isc_splits": 1}
    expected = torch_fidelity.calculate_metrics(
        input1=ArrayImages(images), input2="digits", fid=True, kid=True, prc=True, isc=True, **options,
        feature_extractor_weights_path=str(data_root() / "dqbench" / "zoo" / "digits_classifier"),
        cuda=False, cache=False, verbose=False, datasets_root=str(tmp_path), save_cpu_ram=True,
    )  # fmt: skip
    metrics = scorer("digits").score(images, "digits", tmp_path)
    for name, key in TORCH_FIDELITY_KEYS.items():
        assert metrics[name].value == pytest.approx(expected[key], rel=1e-6), name
    assert set(metrics) == {*TORCH_FIDELITY_KEYS, "sfd_digits", "confident_digits"}
    assert all(metric.low < metric.value < metric.high and metric.n == 600 for metric in metrics.values())
    share = metrics["confident_digits"]
    half = 1.96 * math.sqrt(share.value * (1 - share.value) / 600)
    assert (share.high - share.value, share.value - share.low) == pytest.approx((half, half), rel=0.25)


def test_distances_are_zero_on_the_reference_and_grow_with_damage(tmp_path):
    real, metrics = str(save_images(noisy_digits(300, noise=0), tmp_path / "real")), quick()
    scores = [metrics.score(noisy_digits(300, noise), real, tmp_path) for noise in (0, 40, 120)]
    assert scores[0]["fd_digits"].value == pytest.approx(0, abs=1e-3)
    assert scores[0]["confident_digits"].value > 0.98
    assert scores[0]["precision_digits"].value == scores[0]["recall_digits"].value == 1
    for name, sign in (("fd_digits", 1), ("sfd_digits", 1), ("kd_digits", 1), ("confident_digits", -1)):
        first, second, third = (sign * score[name].value for score in scores)
        assert first < second < third, name
    assert scores[1]["fd_digits"].high < scores[2]["fd_digits"].low


def test_score_streams_a_memory_map_and_takes_gray_or_rgb(tmp_path):
    images, metrics = noisy_digits(40, noise=30), quick()
    np.save(tmp_path / "images.npy", images)
    real = str(save_images(noisy_digits(50, noise=0), tmp_path / "real"))
    expected = metrics.score(images, real, tmp_path)
    assert metrics.score(np.load(tmp_path / "images.npy", mmap_mode="r"), real, tmp_path) == expected
    assert metrics.score(images.repeat(3, axis=3), real, tmp_path) == expected


def test_features_do_not_depend_on_the_batch_size(tmp_path):
    images = noisy_digits(50, noise=30)
    real = str(save_images(noisy_digits(50, noise=0), tmp_path / "real"))
    whole, ones = (quick(batch_size=size).score(images, real, tmp_path / str(size)) for size in (50, 1))
    for name in whole:
        assert ones[name].value == pytest.approx(whole[name].value, rel=1e-4, abs=1e-5)


def test_standard_error_of_a_mean_is_the_textbook_one():
    features = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double() * 3
    draws = resample(lambda x: (x.mean().item(),), features, resamples=2000, seed=0)
    assert draws.shape == (2000, 1)
    assert draws.std(ddof=1) == pytest.approx(features.std().item() / math.sqrt(400), rel=0.05)


def mean_panel(bootstrap: int) -> Panel:
    """One statistic, the mean of features [N, 1]."""
    kind = Kind(lambda features, reference: (features.mean().item(),), higher_is_better=True)
    statistic = Statistic("mean", "x", ["mean"], bootstrap, options={})
    return Panel({"mean": statistic}, {"mean": kind}, "e", "p", seed=0)


@pytest.mark.parametrize("bootstrap", [5, 10])
def test_intervals_of_few_resamples_hold_95_percent(bootstrap):
    panel, rng, trials = mean_panel(bootstrap), torch.Generator().manual_seed(0), 1500
    truth, held = torch.zeros(1, 1), 0
    for _ in range(trials):
        metric = panel.measure({"x": torch.randn(200, 1, generator=rng)}, {"x": truth})["mean"]
        held += metric.low < 0 < metric.high
    assert held / trials == pytest.approx(0.95, abs=0.015)  # with the normal quantile 0.88 of 5 resamples, 0.92 of 10


def test_quantiles_are_students():
    assert [t_95(count) for count in (2, 5, 10)] == pytest.approx([12.706, 2.776, 2.262], abs=1e-3)
    assert t_95(10**6) == pytest.approx(1.96, abs=1e-3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)


def test_difference_on_the_same_seeds_has_the_interval_of_the_differences(tmp_path):
    full = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
    own = full + 0.1 + 0.01 * torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).double()
    panel, truth = mean_panel(400), {"x": torch.zeros(1, 1)}
    metric, reference = (panel.measure({"x": features}, truth)["mean"] for features in (own, full))
    delta = difference(metric, reference)
    half = mean_interval((own - full).flatten().numpy())[1]  # closed form of the paired difference of means
    assert delta["value"] == pytest.approx((own - full).mean().item())
    assert delta["high"] - delta["value"] == pytest.approx(half, rel=0.1) == delta["value"] - delta["low"]
    assert metric.low < reference.high and delta["low"] > 0  # the intervals of the two overlap, yet they differ
    images = noisy_digits(200, noise=20)
    whole = quick().score(images, "digits", tmp_path)
    assert difference(whole["fd_digits"], whole["fd_digits"]) == {"value": 0, "low": 0, "high": 0}


def test_registration_can_be_repeated():
    extractors.register()
    extractors.register()


# reference -----------------------------------------------------------------------------------------------------------


def test_reference_features_are_computed_once(tmp_path, monkeypatch):
    images, metrics, calls = noisy_digits(16, noise=30), quick(), []
    extract = type(metrics)._extract

    def counted(self, data, device):
        calls.append(len(data))
        return extract(self, data, device)

    monkeypatch.setattr(type(metrics), "_extract", counted)
    first = metrics.score(images, "digits", tmp_path)
    assert metrics.score(images, "digits", tmp_path) == first and calls == [16, 1797, 16]
    assert len(metrics.reference_hash("digits", tmp_path)) == 12 and calls == [16, 1797, 16]


def test_folder_of_the_same_images_is_the_same_reference(tmp_path):
    images, metrics = noisy_digits(64, noise=0), quick()
    folder = save_images(images, tmp_path / "real")
    scores = metrics.score(images, str(folder), tmp_path)
    assert scores["fd_digits"].value == pytest.approx(0, abs=1e-3)
    moved = save_images(images, tmp_path / "elsewhere")
    other = save_images(noisy_digits(64, noise=9), tmp_path / "other")
    hashes = [metrics.reference_hash(str(path), tmp_path) for path in (folder, moved, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_reference_hash_names_the_extractor_too(tmp_path):
    names = {scorer("digits", version=version).reference_hash("digits", tmp_path) for version in (1, 2)}
    assert len(names) == 2 and scorer("none").reference_hash("digits", tmp_path) is None


def test_weights_count_by_content_wherever_they_lie(tmp_path):
    weights = data_root() / "dqbench" / "zoo" / "digits_classifier"
    copy = shutil.copytree(weights, tmp_path / "copy")
    zoo, moved = scorer("digits"), scorer("digits", weights=str(copy))
    assert zoo.weights_hash() == moved.weights_hash() and scorer("none").weights_hash() is None
    assert zoo.reference_hash("digits", tmp_path) == moved.reference_hash("digits", tmp_path)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert zoo.weights_hash() != moved.weights_hash()


# device ---------------------------------------------------------------------------------------------------------------


def test_features_are_computed_where_the_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that runtime.device=cpu leaves alone
    images, metrics = noisy_digits(16, noise=30), quick()
    metrics.check("digits", 16)
    metrics.score(images, "digits", tmp_path, device="cpu")
    with pytest.raises(NotImplementedError, match="meta"):  # a device without data: nothing comes back from it
        metrics.score(images, "digits", tmp_path, device="meta")


@pytest.mark.gpu
def test_features_of_a_gpu_are_those_of_the_cpu(tmp_path):
    images, metrics = noisy_digits(64, noise=30), quick()
    cpu, gpu = (metrics.score(images, "digits", tmp_path / name, device=name) for name in ("cpu", "cuda"))
    for name in cpu:
        assert gpu[name].value == pytest.approx(cpu[name].value, rel=1e-2, abs=1e-3), name


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_metrics_config_builds_and_refuses_or_passes_before_sampling(path, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics = build(OmegaConf.load(path))
    monkeypatch.setattr(clean_fid, "HOME", tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    data = "text_tasks" if path.stem == "text" else "digits"
    if path.stem in REFUSED:
        with pytest.raises(UserError, match=REFUSED[path.stem]):
            metrics.check(data, 16)
    else:
        metrics.check(data, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"extractor": "resnet"}, "no feature extractor 'resnet'; known: .*digits-classifier"),
        ({"weights": "nowhere"}, "no weights at nowhere; model.safetensors is needed"),
        ({"statistics__frechet__kind": "fid"}, "statistics.frechet.kind=fid is unknown; allowed: frechet, kernel"),
        ({"statistics__frechet__layer": "2048"}, "layer=2048 is unknown; allowed: pooled, spatial, logits"),
        ({"statistics__kernel__bootstrap": 0}, "kernel.bootstrap=0 gives no interval"),
        (
            {"statistics__kernel__options__size": 3},
            "options has subsets, subset_size, size; needed: subsets, subset_size",
        ),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        scorer("digits", **overrides).check("digits", 16)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (None, 16, "no reference data None: model.data must be"),
        ("dogs", 16, "no reference data 'dogs': .* or one of .*digits"),
        ("empty", 16, "holds no images"),
        ("cifar10-val", 16, "the data set cifar10-val is not in"),
        ("digits", 4, "4 samples are too few to score"),
    ],
)
def test_wrong_reference_is_refused(data, count, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        scorer("digits").check(data, count)


def test_images_of_another_size_or_type_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"8x8 images, got \(16, 16\)"):
        scorer("digits").score(np.zeros((9, 16, 16, 1), np.uint8), "digits", tmp_path)
    with pytest.raises(UserError, match="uint8"):
        scorer("digits").score(np.zeros((9, 8, 8, 1), np.float32), "digits", tmp_path)


# paired --------------------------------------------------------------------------------------------------------------


def test_paired_metrics_have_their_closed_forms():
    images = np.random.default_rng(0).integers(0, 200, (300, 8, 8, 1)).astype(np.uint8)
    scores = paired(images + np.uint8(10), images)
    assert scores["psnr"].value == pytest.approx(20 * math.log10(255 / 10), rel=1e-5) and scores["psnr"].n == 300
    assert scores["ssim"].value == pytest.approx(np.mean([ssim(a + 10.0, a) for a in images[..., 0]]), abs=1e-4)
    a, b = (image.reshape(300, -1) / 127.5 - 1 for image in (images + 10.0, images))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert scores["cosine"].value == pytest.approx(cosines.mean(), abs=1e-6)
    half = 1.96 * cosines.std(ddof=1) / math.sqrt(300)
    assert (scores["cosine"].low, scores["cosine"].high) == pytest.approx(
        (cosines.mean() - half, cosines.mean() + half)
    )


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, uniform 7x7 windows, K1 0.01, K2 0.03, population moments."""
    values = []
    for row, column in np.ndindex(2, 2):
        x, y = (image[row : row + 7, column : column + 7].astype(float) for image in (a, b))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        numerator = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
        values.append(numerator / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (4, 16, 16, 3), (2, 5, 5, 1)])
def test_identical_images_reach_the_stated_cap(shape):
    images = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    scores = paired(images, images)
    cap = 10 * math.log10(255**2 * math.prod(shape[1:]))
    assert scores["psnr"].value == pytest.approx(cap) and f"{cap:.1f} dB" in scores["psnr"].protocol
    assert scores["ssim"].value == pytest.approx(1) and scores["cosine"].value == pytest.approx(1)
    one_off = images.copy()
    one_off[:, 0, 0, 0] += 1
    assert paired(one_off, images)["psnr"].value == pytest.approx(cap, abs=1e-3)


def test_paired_refuses_what_has_no_pairs_or_no_interval():
    with pytest.raises(UserError, match="equal shapes"):
        paired(np.zeros((3, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="at least 2 samples"):
        paired(np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8))


# guards --------------------------------------------------------------------------------------------------------------


def with_nan() -> np.ndarray:
    images = np.random.default_rng(0).random((1500, 4, 4, 1))
    images[1200, 1, 2] = np.nan
    return images


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((4, 8, 8, 1), np.uint8), "every one of the 4 samples is a single color"),
        (np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(8, 1), "single color"),
        (np.tile(np.eye(8, dtype=np.uint8)[None, ..., None], (1100, 1, 1, 1)), "all 1100 samples are the same image"),
        (with_nan(), "sample 1200 holds NaN or infinity"),
        (np.zeros((0, 8, 8, 1), np.uint8), "no samples"),
    ],
)
def test_degenerate_samples_fail_loudly(samples, message):
    with pytest.raises(DegenerateSamples, match=message):
        check_samples(samples)


def test_good_samples_pass_even_with_some_blank_ones():
    images = noisy_digits(20, noise=0)
    images[:5] = 0
    check_samples(images)


# the real networks, with random weights in the real file formats -----------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A state dict as torch-fidelity's release holds it."""

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        state = Untrained("inception-v3-compat", ["2048"]).state_dict()
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path


def test_inception_metrics_are_what_torch_fidelity_computes(inception_weights, tmp_path):
    images = noisy_digits(9, noise=90).repeat(3, axis=3)
    real = save_images(noisy_digits(8, noise=0), tmp_path / "real")
    small = {f"statistics__{key}__bootstrap": 2 for key in ("frechet", "kernel", "inception_score", "manifold")}
    small |= {"statistics__frechet__layer": "192", "statistics__inception_score__options__splits": 2}
    metrics = scorer("inception", weights=str(inception_weights), **small)
    metrics.check(str(real), 9)
    scores = metrics.score(images, str(real), tmp_path)
    expected = torch_fidelity.calculate_metrics(
        input1=ArrayImages(images), input2=str(real), fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=8, isc_splits=2, feature_extractor="inception-v3-compat", feature_layer_fid="192",
        feature_layer_prc="2048", feature_extractor_weights_path=str(inception_weights),
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    keys = ("fid", "kid", "precision", "recall", "is")
    for name, key in zip(keys, TORCH_FIDELITY_KEYS.values(), strict=True):
        assert scores[name].value == pytest.approx(expected[key], rel=1e-4, abs=1e-9), name


def test_spatial_features_are_those_of_the_adm_evaluator_and_leave_the_others_alone(inception_weights):
    images = torch.from_numpy(noisy_digits(2, noise=90)).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    extractors.register()

    def features(name: str, *layers: str) -> tuple[torch.Tensor, ...]:
        made = create_feature_extractor(
            name, list(layers), cuda=False, feature_extractor_weights_path=inception_weights
        )
        maps = []
        made.Mixed_6d.register_forward_hook(lambda *call: maps.append(call[-1]))
        found = made(images)
        return (*found, *maps)

    spatial, pooled, block = features("inception-v3-spatial", "spatial", "2048")
    assert spatial.shape == (2, 7 * 17 * 17) and torch.equal(spatial, block[:, :7].flatten(1)), (
        "the 1x1 branch is first"
    )
    assert torch.equal(pooled, features("inception-v3-compat", "2048")[0])
    assert torch.equal(features("inception-v3-spatial", "spatial", "64")[0], spatial)


def test_damaged_inception_weights_are_refused_before_sampling(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match="weights.pth does not hold weights of inception-v3-compat"):
        scorer("inception", weights=str(tmp_path / "weights.pth")).check("digits", 16)
    with pytest.raises(UserError, match="weights.pth does not hold clean-fid's TorchScript Inception"):
        scorer("clean_fid", weights=str(tmp_path / "weights.pth")).check("digits", 16)


class TorchScriptInception(torch.nn.Module):
    """What clean-fid reads of its file: a module whose `layers` give 2048 features of a normalized 299x299 image."""

    def __init__(self):
        super().__init__()
        pool, conv = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Conv2d(3, 2048, 4)
        self.layers = torch.nn.Sequential(pool, conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_clean_fid_is_what_clean_fid_computes_from_folders(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(TorchScriptInception()).save(tmp_path / "mine.pt")
    fake, real = noisy_digits(12, noise=90), noisy_digits(10, noise=0)
    folders = [save_images(images, tmp_path / name) for images, name in ((fake, "fake"), (real, "real"))]
    metrics = scorer("clean_fid", weights=str(tmp_path / "mine.pt"))
    del metrics.statistics["frechet"]  # 20 s per 2048x2048 matrix root; its function has a test of its own
    scores = metrics.score(fake, str(folders[1]), tmp_path)
    model = clean_fid.load_inception(tmp_path / "mine.pt")
    device = torch.device("cpu")
    features = [cleanfid_fid.get_folder_features(str(f), model, num_workers=0, device=device) for f in folders]
    np.random.seed(0)
    assert scores["kid_clean"].value == pytest.approx(cleanfid_fid.kernel_distance(features[1], features[0]), rel=1e-4)


def test_clean_frechet_distance_of_a_shift_is_its_squared_length():
    features = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)).double()
    assert clean_fid.frechet(features + 2, features.numpy())[0] == pytest.approx(5 * 2**2)


def test_metric_is_plain_data():
    metric = Metric(1.0, 0.5, 1.5, 10, "e", "p", higher_is_better=False, resamples=(0.9, 1.1))
    assert metric.to_dict() == {
        "value": 1.0, "low": 0.5, "high": 1.5, "n": 10, "extractor": "e", "protocol": "p", "higher_is_better": False
    }  # fmt: skip
