"""A preset's tables as CSV: one line for each published row and metric, with everything that is known of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dqbench.launching.table import SCALES
from dqbench.published import PublishedRow
from dqbench.rendering.estimates import Estimate, change, estimate
from dqbench.rendering.footnotes import against, status
from dqbench.rendering.pairs import Pair, Part
from dqbench.rendering.presets import Preset
from dqbench.rendering.view import View, metric_names, published_change, weakest

TABLE = ("table", "caption", "model", "dataset", "resolution", "sampler", "steps", "eta", "guidance")
PROTOCOL = ("n_samples", "fid_impl", "reference")
ROW = ("method", "w", "a", "label", "calib_samples", "verified", "evidence", "read_from", "relation", "source", "notes")
OURS = ("metric", "value", "low", "high", "n", "seeds", "delta", "delta_low", "delta_high", "run_ids", "differences")
HEADER = (
    *("preset", "paper", "arxiv"),
    *TABLE,
    *(f"published_{key}" for key in PROTOCOL),
    *ROW,
    *("metric", "published", "published_fp", "published_delta", "published_delta_state", "status", "reason"),
    *(f"{scale}_{key}" for scale in SCALES for key in OURS),
)


def flat(preset: Preset, views: Sequence[View]) -> str:
    """The whole file; an empty field is what is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    for view in views:
        for pair in view.part.pairs:
            writer.writerows(lines(preset, view.part, pair))
    return text.getvalue()


def lines(preset: Preset, part: Part, pair: Pair) -> Iterator[dict[str, Any]]:
    """Those of a published row."""
    row, table = pair.published, part.table
    whole = {"preset": preset.name, "paper": preset.axes.paper, "arxiv": preset.paper.arxiv}
    whole |= {key: getattr(table, key) for key in TABLE}
    whole |= {f"published_{key}": getattr(table.protocol, key) for key in PROTOCOL}
    whole |= {key: value for key, value in asdict(row).items() if key in ROW}
    whole |= {"status": status(part, pair), "reason": pair.reason}
    for name in metric_names(part):
        if name in row.values:
            own = [ours(part, pair, scale, name) for scale in SCALES]
            yield whole | {"metric": name} | numbers(part, row, name) | own[0] | own[1]


def numbers(part: Part, row: PublishedRow, name: str) -> dict[str, Any]:
    """A published number, its full precision, their difference and how far that is verified."""
    base = part.base.values.get(name) if part.base else None
    moved = published_change(part, row, name)
    state = None if moved is None else weakest(part, row)
    return {
        "published": row.values[name],
        "published_fp": base,
        "published_delta": moved,
        "published_delta_state": state,
    }


def ours(part: Part, pair: Pair, scale: str, name: str) -> dict[str, Any]:
    """What we have at a scale."""
    rows, own = pair.ours[scale], part.metrics[scale].get(name)
    value, moved = estimate(rows, own), change(rows, own)
    if value is None:
        return {}
    found = {"metric": own, **asdict(value), "run_ids": " ".join(row.run_id for row in rows if row.run_id)}
    found |= delta(moved) if moved else {}
    found["differences"] = "; ".join(map(str, against(part, pair, scale, name)))
    return {f"{scale}_{key}": entry for key, entry in found.items()}


def delta(found: Estimate) -> dict[str, float]:
    """The fields of a change."""
    return {"delta": found.value, "delta_low": found.low, "delta_high": found.high}
