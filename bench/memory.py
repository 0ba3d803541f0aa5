"""Peak memory of recording, calibrating and reconstructing digits_ddpm: it must not follow the calibration set's size.

python -m bench.memory ROWS runs it once and prints {"peak": bytes} as its last line.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.table import AT_MOST, Ratio

TARGET = 1.1
STEPS = 16


def run(rows: int) -> None:
    """Record rows / STEPS chains, pick a calibration set of `rows`, run qdiffusion on it with a few iterations."""
    from omegaconf import OmegaConf

    from dqbench.calibration import CalibrationSet, calibration_seeds, record_trajectory, select
    from dqbench.config import build, compose
    from dqbench.models import load
    from dqbench.sampling import set_sampler
    from dqbench.stages import resuming

    chains = rows // STEPS
    size = [f"calib.samples={rows}", f"calib.chains={chains}", f"calib.steps={STEPS}"]
    cfg = compose(["recon.iters=2", "recon.iters_act=2", *size])
    model, sampler, calib, bits = (OmegaConf.to_object(cfg[key]) for key in ("model", "sampler", "calib", "bits"))
    sampler = replace(sampler, steps=STEPS, batch_size=16)
    pipe = set_sampler(load(model), sampler)
    with tempfile.TemporaryDirectory() as name:
        trajectory, chosen = Path(name, "trajectory"), Path(name, "calibration")
        for folder in (trajectory, chosen):
            folder.mkdir()
        record_trajectory(pipe, sampler, chains, lambda span: calibration_seeds(span, 0), trajectory)
        select(trajectory, calib, 0, chosen)
        with resuming(Path(name)):
            build(cfg.method)(pipe, CalibrationSet.open(chosen, 0), bits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"peak": peak}))


def measure(rows: int) -> dict[str, int]:
    """The peak of a process of its own."""
    command = [sys.executable, "-m", "bench.memory", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def bench(quick: bool) -> tuple[list[Ratio], dict]:
    """Peak resident memory with a set of twice the rows over that with the rows."""
    rows = 128 if quick else 1024
    small, large = measure(rows), measure(2 * rows)
    detail = ", ".join(f"{n} rows {found['peak'] / 2**20:.0f} MiB" for n, found in ((rows, small), (2 * rows, large)))
    value = large["peak"] / small["peak"]
    line = Ratio("digits_ddpm, peak memory: calibration set doubled", value, AT_MOST, TARGET, detail)
    return [line], {str(rows): small, str(2 * rows): large}


if __name__ == "__main__":
    run(int(sys.argv[1]))
