"""Composition, identity and validation of a run's config, without the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dqbench.commands import exit_status
from dqbench.config import build, compose, expand
from dqbench.errors import UserError
from dqbench.identity import identity, run_id
from dqbench.launching.checks import check, check_range

CONF = Path(__file__).parents[1] / "conf"
PRESETS = [
    f"{folder.name}={file.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
    for file in sorted(folder.glob("*.yaml"))
]


BESIDE = {"base=": ["method=ptqd"], "sampler=llada": ["model=text_mdlm"], "sampler=dream": ["model=text_mdlm"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_passes_the_checks(preset: str) -> None:
    cfg = compose([preset, *next((more for start, more in BESIDE.items() if preset.startswith(start)), [])])
    check(cfg)
    build(cfg.method)
    build(cfg.metrics)
    build(cfg.tracking)


@pytest.mark.parametrize(
    "override, same",
    [
        ("tracking=none", True),
        ("paths.results=elsewhere", True),
        ("runtime.device=cuda", True),
        ("runtime.force=true", True),
        ("sampler.batch_size=7", True),
        ("hydra.verbose=true", True),
        ("seed=1", False),
        ("bits.softmax=7", False),
        ("bits=w4a4", False),
        ("recon.lr=1.0e-4", False),
        ("recon.batch_size=16", False),
        ("sampler.num_samples=1000", False),
        ("method.version=2", False),
        ("model.path=elsewhere", False),
    ],
)
def test_identity_is_what_the_numbers_depend_on(override: str, same: bool) -> None:
    assert (run_id(compose([override])) == run_id(compose([]))) is same


def test_the_harness_batch_size_is_throughput_only() -> None:
    harness = ["model=llada_8b_base", "metrics=lm_eval"]
    same, other = ([*harness, f"metrics.protocol.{change}"] for change in ("batch_size=3", "draws=3"))
    assert run_id(compose(same)) == run_id(compose(harness)) != run_id(compose(other))


def test_identity_does_not_depend_on_how_a_value_was_given() -> None:
    assert (
        run_id(compose(["bits=w4a8", "seed=0"]))
        == run_id(compose(["bits=w8a8", "bits.weight=4"]))
        == run_id(compose([]))
    )
    assert "${" not in str(identity(compose([])))


def test_a_sweep_is_the_product_of_its_choices() -> None:
    cells = list(expand(["method=fp32,rtn", "bits=w8a8,w4a8", "seed=3"]))
    assert cells == [[f"method={m}", f"bits={b}", "seed=3"] for m in ("fp32", "rtn") for b in ("w8a8", "w4a8")]
    assert len({run_id(compose(cell)) for cell in cells}) == 4


@pytest.mark.parametrize("bad", [-0.5, 1.5, math.nan, math.inf])
def test_check_range(bad: float) -> None:
    cfg = compose([])
    check_range("sampler", cfg.sampler, {"eta": (0, 1)})
    cfg.sampler.eta = bad
    with pytest.raises(UserError, match="sampler.eta=.* is out of range; allowed: 0 to 1"):
        check_range("sampler", cfg.sampler, {"eta": (0, 1)})
    if math.isfinite(bad):
        check_range("sampler", cfg.sampler, {"eta": (None, None)})


def test_build_wants_every_key() -> None:
    cfg = compose(["method=rtn"])
    del cfg.method.attention
    with pytest.raises(UserError, match="method.attention.*[Mm]issing|[Mm]issing.*attention"):
        build(cfg.method)


def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text("table:\n  rows: [method\n")
    with pytest.raises(SystemExit) as end, exit_status():
        OmegaConf.load(tmp_path / "mine.yaml")
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "cannot be read" in line and "mine.yaml" in line
