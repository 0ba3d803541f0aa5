"""Every preset composes and expands to cells with run ids of their own."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from dqbench.config import compose, data_root, expand, run_id
from dqbench.launching.checks import check

PRESETS = sorted((data_root() / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_expands_without_duplicates(preset):
    overrides = [f"+sweeps={preset.stem}"]
    axes = [f"{key}={value}" for key, value in OmegaConf.load(preset).hydra.sweeper.params.items()]
    cells = [compose(cell) for cell in expand([*axes, *overrides])]
    assert len(cells) > 1 and len({run_id(cell) for cell in cells}) == len(cells)
    for cell in cells:
        check(cell)
        assert cell.table.caption
