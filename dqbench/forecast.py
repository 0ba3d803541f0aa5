"""What an artifact would take, in bytes, and a cell, in seconds: by shapes, and by the rows of cells like it."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from dqbench.results import Row
    from dqbench.run import Cell


@dataclass(frozen=True)
class Note:
    """An artifact that a cell asks for."""

    stage: str
    depends: dict[str, Any]
    cell: Cell

    @property
    def timed(self) -> str | None:
        """The entry of a row's timing that tells what it takes; None: nothing does, or it is a small part."""
        if self.stage in ("quantized", "statistics"):
            return "quantize_s"
        recorded = self.depends.get("purpose") == "calibration"
        if recorded or self.stage == "calibration" and "trajectory" not in self.depends:
            return "calibrate_s"
        return "generate_s" if self.stage == "samples" else None

    def bytes(self, params: int) -> int:
        """Estimate: recorded inputs and outputs in float32, weights as they are computed with, samples."""
        cell, row = self.cell, sum(map(prod, inputs(self.cell).values()))
        guided = 2 if cell.sampler.guidance != 1 else 1
        if self.stage == "trajectory":
            return 2 * 4 * self.depends["chains"] * cell.sampler.steps * row * guided
        if self.stage == "calibration":
            count = cell.calib.samples or cell.calib.chains * (cell.calib.steps or cell.sampler.steps)
            return 4 * count * row * guided
        if self.stage == "quantized":
            return 4 * params
        return self.depends["num_samples"] * sample_bytes(cell) if self.stage == "samples" else 0


def inputs(cell: Cell) -> dict[str, list[int]]:
    """Shapes of one call of the denoiser."""
    from dqbench.models import architecture, input_shapes

    return input_shapes(cell.model, architecture(cell.model))


def sample_bytes(cell: Cell) -> int:
    """Bytes of one sample: an image of uint8, as large as the VAE makes it; tokens of int32."""
    from dqbench.models import snapshot

    shapes = inputs(cell)
    if "sample" not in shapes:
        return 4 * max(map(prod, shapes.values()))
    channels, height, width = shapes["sample"]
    for part in ("vae", "vqvae"):
        if (file := Path(snapshot(cell.model)) / part / "config.json").is_file():
            channels, factor = 3, 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)
            height, width = factor * height, factor * width
    return channels * height * width


def seconds(cfg: DictConfig, past: Sequence[Row], new: Counter[str] | None) -> float | None:
    """What is left of a cell by the rows of its model and method: medians of those with its bits, else of all.

    new: how many artifacts of each entry of a row's timing are to be built; None: not known, all of them.
    """
    own = [row for row in past if row.config["model"]["name"] == cfg.model.name]
    own = [row for row in own if row.config["method"]["name"] == cfg.method.name]
    own = [row for row in own if row.config["bits"]["weight"] == cfg.bits.weight] or own
    if not own:
        return None
    each = {name: statistics.median(row.timing[name] for row in own) for name in ("calibrate_s", "quantize_s")}
    each["generate_s"] = statistics.median(row.timing["generate_s"] / work(row.config["sampler"]) for row in own)
    each["generate_s"] *= work(cfg.sampler)
    count = Counter(calibrate_s=1, quantize_s=1, generate_s=2) if new is None else new
    count["quantize_s"] = min(count["quantize_s"], 1)  # the time of a base and its refinements is one number
    score = statistics.median(row.timing["score_s"] for row in own)
    return score + sum(count[name] * value for name, value in each.items())


def work(sampler: Mapping[str, Any]) -> int:
    """Samples x steps."""
    return sampler["num_samples"] * sampler["steps"]
