"""What one cell changes in the process does not reach the next one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dqbench import resources
from dqbench.resources import full_float32, peak_memory, repeatable, restart_peak, set_threads

MIB = 2**20


@pytest.fixture(autouse=True)
def _as_before():
    threads, places = torch.get_num_threads(), (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    yield
    torch.set_num_threads(threads)
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


def test_a_large_network_and_one_without_convolutions_get_all_threads_back_after_a_small_one(monkeypatch):
    monkeypatch.setattr(resources, "ALL_THREADS", 3)
    small, large = nn.Conv2d(2, 2, 1), nn.Conv2d(resources.SMALL, 1, 1, device="meta")
    found, asked = [], ((None, small), (None, large), (2, small), (2, large), (None, small), (None, nn.Linear(2, 2)))
    for wanted, network in asked:
        set_threads(wanted, network)
        found.append(torch.get_num_threads())
    assert found == [1, 3, 2, 2, 1, 3]


def test_a_small_network_is_quantized_on_one_thread_whatever_there_is():
    torch.set_num_threads(3)
    large, found = nn.Linear(resources.SMALL, 1, device="meta"), []
    for wanted, network in ((None, nn.Linear(2, 2)), (2, nn.Linear(2, 2)), (None, large)):
        with repeatable(wanted, network):
            found.append(torch.get_num_threads())
    assert found == [1, 3, 3] and torch.get_num_threads() == 3


@pytest.mark.skipif(not resources.CLEAR.exists(), reason="the kernel cannot restart the peak")
def test_the_peak_is_the_cells_not_the_processs():
    torch.ones(256 * MIB, dtype=torch.uint8)
    high = peak_memory()
    restart_peak()
    assert peak_memory() < high - 128 * MIB
    torch.ones(256 * MIB, dtype=torch.uint8)
    assert peak_memory() > high - 64 * MIB


def test_tf32_is_off():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    full_float32()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
