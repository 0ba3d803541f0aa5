"""Every preset composes and expands to cells with run ids of their own."""

from __future__ import annotations

import pytest

from dqbench.config import compose, data_root, run_id
from dqbench.launching.checks import check
from dqbench.launching.table import sweep

PRESETS = sorted((data_root() / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_expands_without_duplicates(preset):
    cells = [compose(cell) for cell in sweep([f"+sweeps={preset.stem}"])]
    assert len(cells) > 1 and len({run_id(cell) for cell in cells}) == len(cells)
    for cell in cells:
        check(cell)
        assert cell.table.caption
