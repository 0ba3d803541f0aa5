"""Every preset composes at both scales, expands to cells with run ids of their own, and would start."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

import dqbench.run
from dqbench.architectures import build as build_network
from dqbench.config import Config, compose, data_root, register
from dqbench.errors import UserError
from dqbench.identity import plain, run_id
from dqbench.launching.preflight import check_call
from dqbench.launching.searchpath import SweepsSource
from dqbench.launching.table import SCALES, Table, read_table, sweep
from dqbench.metrics.features import FeatureMetrics
from dqbench.quant.attach import find_units
from dqbench.quant.plan import LAYER_TYPES, matches
from dqbench.schedulers import make_scheduler
from dqbench.text.harness_metrics import HarnessMetrics

PRESETS = sorted(path.stem for path in (data_root() / "sweeps").glob("*.yaml"))
PAPERS = [name for name in PRESETS if "full" in OmegaConf.load(data_root() / "sweeps" / f"{name}.yaml").table]
SETTINGS = sorted(path.stem for path in (data_root() / "conf" / "setting").glob("*.yaml"))
TABLES = {  # tables that must have a preset
    *(f"ptq4dm_table{number}" for number in range(1, 6)), *(f"tfmq_table{number}" for number in range(1, 6)),
    "qdiffusion_table1", "qdiffusion_table2", "ptqd_main", "ptqd_ablation", "quartz_main", "quant_dllm_table",
    "quant_dllm_ablation",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def hydra_once() -> Iterator[None]:
    """One Hydra for all that is composed here: half of the time."""
    register()
    with hydra.initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        yield


@pytest.fixture
def without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cell be checked where neither its weights nor its reference data are here; all else is checked as ever."""

    def preflight(model: Any, sampler: Any, device: str) -> Any:
        check_call(model, sampler)
        trained = 4000 if "Improved" in model.pipeline else 1000
        return make_scheduler({} if "text" in model.pipeline else {"num_train_timesteps": trained}, sampler)

    (tmp_path / "data").mkdir()
    for name in ("c4.txt", "prompts.txt", "coco_captions.txt"):
        (tmp_path / "data" / name).write_text("a text\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dqbench.run, "preflight", preflight)
    monkeypatch.setattr(FeatureMetrics, "check", lambda self, reference, count: None)
    monkeypatch.setattr(HarnessMetrics, "check", lambda self, reference, count: None)


def overrides(name: str, scale: str) -> list[list[str]]:
    """Cells of a preset that have every value of every axis: one axis varies, the others stay at their first values."""
    own = OmegaConf.load(data_root() / "sweeps" / f"{name}.yaml")
    axes = {key: str(value).split(",") for key, value in (own.table.get(scale) or own.hydra.sweeper.params).items()}
    assert {f"{bits}.yaml" for bits in axes.get("bits", ())} <= set(os.listdir(data_root() / "conf" / "bits"))
    first = {key: values[0] for key, values in axes.items()}
    varied = [first | {key: value} for key, values in axes.items() for value in values if key not in ("seed", "bits")]
    unique = {tuple(f"{key}={value}" for key, value in cell.items()) for cell in varied}
    preset = [f"+sweeps={name}", f"scale={scale}"] if "defaults" in own else []
    return sorted([*cell, *preset] for cell in unique)


@cache
def admitted(cell: tuple[str, ...]) -> tuple[DictConfig, dqbench.run.Cell]:
    """A composed cell, all of it built and checked; tables that share cells share the work."""
    cfg = compose(list(cell))
    return cfg, dqbench.run.Cell(cfg)


def test_every_table_that_is_known_has_a_preset():
    assert set(PAPERS) == TABLES


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes_without_duplicates(name):
    found = [admitted(tuple(cell))[0] for cell in overrides(name, "mini")]
    assert len({run_id(cfg) for cfg in found}) == len(found)
    assert not any(set(cfg) - set(Config.__annotations__) for cfg in found)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_own_cells_would_start_where_their_checkpoints_are(name, without_checkpoints):
    found = [admitted(tuple(cell)) for cell in overrides(name, "full")]
    assert len({run_id(cfg) for cfg, _ in found}) == len(found)
    assert not any(cell.model.path.startswith("zoo:") for _, cell in found)


def test_a_sweep_is_the_product_of_its_axes_and_the_command_line_wins():
    whole = sweep(["+sweeps=tfmq_table2"])
    assert len({tuple(cell) for cell in whole}) == len(whole) == 45
    assert len(sweep(["+sweeps=tfmq_table2", "scale=full"])) == 60
    cut = sweep(["+sweeps=tfmq_table2", "method=fp32,rtn", "bits=w4a8", "seed=0"])
    assert [cell[1] for cell in cut] == ["method=fp32", "method=rtn"]
    assert all({"bits=w4a8", "seed=0", "setting=digits50"} <= set(cell) for cell in cut)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_published_maps_to_cells_of_the_sweep(name):
    table = read_table(OmegaConf.load(data_root() / "sweeps" / f"{name}.yaml").table)
    for scale, settings in (("mini", table.mini_models), ("full", table.models)):
        axes = {key: str(value).split(",") for key, value in getattr(table, scale).items()}
        assert set(settings.values()) <= set(axes["setting"]) <= set(SETTINGS)
    for override in chain.from_iterable(table.overrides(method) or () for method in table.methods):
        key, _, value = override.partition("=")
        swept = [str(getattr(table, scale).get(key, value)).split(",") for scale in SCALES]
        stands_aside = value == "fp32" or table.missing or key in ("calib", "method")
        assert stands_aside or all(value in values for values in swept), override


MODELS = {  # parameters of the authors' networks
    "ldm4_celebahq": 274_056_163, "ldm4_ffhq": 274_056_163, "iddpm_imagenet64": 121_063_942, "iddpm_cifar10":
    52_546_438, "ldm4_imagenet": 400_920_579, "ldm8_lsun_church": 294_966_916,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_patterns_of_a_model_find_what_they_name(name):
    model = OmegaConf.to_object(compose([f"model={name}", "method=fp32"]).model)
    network = build_network(model.architecture)
    assert sum(parameter.numel() for parameter in network.parameters()) == MODELS[name]
    layers = [name for name, module in network.named_modules() if isinstance(module, LAYER_TYPES)]
    units = find_units(network, model.units, dict.fromkeys(layers))
    assert len(units) > 10 and set(chain.from_iterable(owned(unit, layers) for unit in units)) == set(layers)
    for pattern in (*model.shortcuts, *model.time_embedding):
        assert any(matches(name, [pattern]) for name in layers), pattern


def owned(unit: str, layers: list[str]) -> list[str]:
    """The layers of a unit."""
    return [name for name in layers if name == unit or name.startswith(f"{unit}.")]


PROTOCOLS = {  # steps, eta, guidance, samples as the papers' releases have them
    "cifar10_ddim100": (100, 0.0, 1.0, 50_000), "bedrooms200": (200, 1.0, 1.0, 50_000),
    "churches200": (200, 0.0, 1.0, 50_000), "churches500": (500, 0.0, 1.0, 50_000),
    "celebahq200": (200, 0.0, 1.0, 50_000), "ffhq200": (200, 1.0, 1.0, 50_000),
    "imagenet20": (20, 0.0, 3.0, 50_000), "imagenet250": (250, 1.0, 1.5, 50_000),
    "sd14_plms50": (50, 0.0, 7.5, 30_000), "imagenet64_ddim250": (250, 0.0, 1.0, 10_000),
    "imagenet64_ddpm4000": (4000, 0.0, 1.0, 10_000), "cifar10_iddpm_ddim100": (100, 0.0, 1.0, 10_000),
}  # fmt: skip


@pytest.mark.parametrize("setting", PROTOCOLS)
def test_settings_are_the_published_protocols(setting):
    cfg = compose([f"setting={setting}", "method=tfmq"])
    sampler = cfg.sampler
    assert (sampler.steps, sampler.eta, sampler.guidance, sampler.num_samples) == PROTOCOLS[setting]
    assert cfg.metrics.statistics.frechet.names == ["fid"]
    assert ("spatial" in cfg.metrics.statistics) == (setting != "cifar10_ddim100"), "sFID"
    assert cfg.calib.steps is None, "a method's own calibration stays"
    assert plain(cfg.method)["weight_every"] == {"bedrooms200": 10, "churches500": 25, "imagenet20": 1}.get(
        setting, plain(cfg.method)["weight_every"]
    )


def test_mixed_precision_takes_the_published_ranges_of_its_setting():
    mixed = plain(compose(["method=ptqd", "method/ablation=mixed", "setting=bedrooms200"]).method)["mixed"]
    assert mixed["mode"] == "ranges" and mixed["ranges"][0] == {"bits": 4, "first": 0.0, "last": 0.225}
    assert plain(compose(["method=ptqd", "method/ablation=mixed"]).method)["mixed"]["mode"] == "rule"


def test_a_published_row_is_found_by_its_label_and_its_column():
    table = Table("c", methods={"A": "rtn", "A (mixed)": ["method=ptqd"]}, models={"M": "x", "M/D/20": "y"})
    assert table.overrides("A") == ["method=rtn"] and table.overrides("A", "mixed") == ["method=ptqd"]
    assert table.overrides("A", "other") is None and table.overrides("B") is None
    assert [table.setting("full", *column) for column in (("M", "D", 20), ("M", "D", 9), ("N", "D", 20))] == [
        "y", "x", None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        (
            {"caption": "c", "metods": {"FP": "fp32"}},
            "table.metods is unknown; did you mean methods? ",
        ),
        ({"caption": "c", "mimi": {"method": "rtn"}}, "table.mimi is unknown; did you mean mini? "),
        ({"mini": {"method": "rtn"}}, "table.caption is missing"),
        ({"caption": "c", "models": 3}, "table.models has the wrong type"),
    ],
)
def test_a_typo_in_a_table_names_its_key(node, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        read_table(OmegaConf.create(node))


def test_hydra_sees_no_other_folder_beside_sweeps(tmp_path):
    for name in ("sweeps", "sweeps/cluster", ".venv/lib", "results"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "some.yaml").touch()
    source = SweepsSource("user", f"sweeps://{tmp_path}")
    assert source.list("", None) == ["sweeps"] and source.list("sweeps", ObjectType.GROUP) == ["cluster"]
    assert source.list("sweeps", ObjectType.CONFIG) == ["some"] and source.is_config("sweeps/cluster/some")
