"""What a cell may use and has used: threads, memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

SMALL = 10_000_000  # parameters: below, threads of a convolutional network wait longer than they compute
ALL_THREADS = torch.get_num_threads()  # what torch chose when the process began
M_MMAP_THRESHOLD, LARGE = -3, 2**20  # of malloc.h; bytes
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def set_threads(wanted: int | None, network: nn.Module) -> None:
    """Use `wanted` CPU threads; None: one for a small convolutional network, else what torch chose at the start.

    The matrix products of a language model of the same size, over thousands of tokens at once, do divide well.
    """
    convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
    torch.set_num_threads(wanted or (1 if convolves and is_small(network) else ALL_THREADS))


@contextmanager
def repeatable(wanted: int | None, network: nn.Module) -> Iterator[None]:
    """Inside: one CPU thread for a small network, unless `wanted` is a number.

    Sums over many rows round by how threads divide them, and what is learned or compensated enlarges that: a quantized
    network should not depend on the number of cores.
    """
    before = torch.get_num_threads()
    if wanted is None and is_small(network):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_small(network: nn.Module) -> bool:
    """Whether it has fewer than SMALL parameters."""
    return sum(parameter.numel() for parameter in network.parameters()) < SMALL


def full_float32() -> None:
    """Multiply and convolve float32 in full precision on a GPU: TF32's 10-bit mantissa would enter every comparison."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def restart_peak() -> None:
    """Let peak_memory() start anew, on the host where the kernel can (Linux)."""
    with suppress(OSError):
        CLEAR.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def trim() -> None:
    """Let the C library give freed memory back to the system, where it can (glibc): it keeps much of it in holes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large() -> None:
    """Let the C library (glibc) give large blocks back when they are freed: it keeps up to 32 MiB each, in holes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def peak_memory() -> int:
    """Peak bytes since restart_peak() on GPU and host together; the host's, except on Linux, of the whole process."""
    return host_peak() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def host_peak() -> int:
    """The host's share of peak_memory()."""
    if STATUS.exists():
        return 1024 * next(int(line.split()[1]) for line in STATUS.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
