"""A sweep that is killed, shared or badly timed ends in the rows of an undisturbed one. More kills: tests/faults.py."""

from __future__ import annotations

import pytest

from tests.faults import CLOCK, Bench, litter, numbers, trial

SWEEP = ("debug=tiny", "metrics=none", "tracking=none", "method=rtn,qdiffusion", "bits=w4a8", "seed=0,1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder with an undisturbed sweep in it."""
    bench = Bench(tmp_path_factory.mktemp("faults"), SWEEP)
    status, told = bench.run("undisturbed")
    assert status == 0, told
    return bench


def test_rows_after_kills_are_those_of_an_undisturbed_sweep(bench):
    expected, count = numbers(bench.results("undisturbed")), bench.moments("undisturbed")
    assert len(expected) == 4 and count > 500
    assert trial(bench, "killed", [round(share * count) for share in (0.37, 0.6)], expected)


def test_two_sweeps_at_once_share_their_work_although_the_clock_goes_backwards(bench):
    both = [bench.start("shared", patch=CLOCK) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert numbers(bench.results("shared")) == numbers(bench.results("undisturbed"))
    assert not litter(bench.results("shared"))
