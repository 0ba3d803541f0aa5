"""Small pictures of runs' first samples: made where the run lies, kept in results/tables/samples/ to be committed."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dqbench.rendering.view import View

WIDTH = 360  # pixels at most


def thumbnails(results: Path, run_ids: Iterable[str]) -> dict[str, Path]:
    """Run id -> picture, of the runs that have one here or had one where the pages were last made."""
    found = {}
    for run_id in dict.fromkeys(run_ids):
        kept, whole = results / "tables" / "samples" / f"{run_id}.png", results / "runs" / run_id / "samples.png"
        if whole.is_file() and not kept.is_file():
            shrink(whole, kept)
        if kept.is_file():
            found[run_id] = kept
    return found


def shrink(source: Path, target: Path) -> None:
    """Write a picture by a whole factor smaller; whole or not at all."""
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp.png")
    try:
        with Image.open(source) as picture:
            picture.reduce(max(1, math.ceil(picture.width / WIDTH))).save(partial, optimize=True)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def as_uri(path: Path) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def gallery(results: Path, views: Sequence[View]) -> list[tuple[str, str]]:
    """(what it is of, picture as data URI) of the first seed of every cell of a preset, each run once."""
    first: dict[str, str] = {}
    for view in views:
        for what, _, run_id in view.runs:
            first.setdefault(what, run_id)
    labels = {run_id: what for what, run_id in reversed(first.items())}
    pictures = thumbnails(results, first.values())
    return [(labels[run_id], as_uri(path)) for run_id, path in pictures.items()]
