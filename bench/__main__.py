"""python -m bench [quick=true] [json=PATH]: every ratio of docs/speed.md, measured in this run on one thread."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that measure memory

from rich.console import Console

from bench import memory, streamed
from bench.table import show
from dqbench.commands import command, split_json
from dqbench.errors import UserError

TITLE = "CPU time, one thread, medians of interleaved turns; plain: tests/reference"


def check_equality() -> None:
    """Ours and the plain implementation learn the same on small units of digits_ddpm; AssertionError otherwise."""
    from dataclasses import replace

    from bench import equality
    from bench.reconstruction import settings
    from bench.units import cases, network

    names = ("conv_in", "up_blocks.0.resnets.0", "mid_block.attentions.0")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(network("digits_ddpm"), names, replace(settings(6), batch_size=16), 32, Path(folder)):
            equality.check(case)


def main(argv: list[str]) -> None:
    """Check that the maths is the same, measure, print, and write json=PATH."""
    rest, target = split_json(argv)
    if unknown := [arg for arg in rest if arg not in ("quick=true", "quick=false")]:
        raise UserError(f"bench: {' '.join(unknown)} is unknown; allowed: quick=true, json=PATH")
    quick, started = "quick=true" in rest, time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 140)
    raw = {}
    ratios, raw["memory"] = memory.bench(quick)  # first: a child's peak counts that of the process it was forked from
    found, raw["streamed"] = streamed.bench(quick)
    ratios += found
    console.print(f"memory: {time.perf_counter() - started:.0f} s", style="dim")
    from bench import ranges, reconstruction, sampling, sparse, stepwise

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    check_equality()
    console.print("equal: losses, alphas and activation steps of ours and of the plain implementation")
    parts = {
        "reconstruction": reconstruction,
        "ranges": ranges,
        "sampling": sampling,
        "stepwise": stepwise,
        "sparse": sparse,
    }
    for name, part in parts.items():
        found, raw[name] = part.bench(quick)
        ratios += found
        console.print(f"{name}: {time.perf_counter() - started:.0f} s", style="dim")
    show(ratios, TITLE, console)
    if target is not None:
        content = {"threads": 1, "quick": quick, "ratios": [ratio.to_dict() for ratio in ratios], "raw": raw}
        target.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    command(main)()
