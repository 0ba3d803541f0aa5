"""What a study leaves: a Markdown page and a picture in results/tables/, and its numbers as JSON where asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqbench.commands import split_json
from dqbench.errors import UserError
from dqbench.results import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def arguments(argv: Sequence[str]) -> tuple[Path, Path | None]:
    """(results folder, where JSON goes) of results=DIR and json=PATH."""
    rest, path = split_json(list(argv))
    if wrong := [argument for argument in rest if not argument.startswith("results=")]:
        raise UserError(f"{wrong[0]} is not understood; allowed: results=DIR, json=PATH")
    return Path(next((argument.removeprefix("results=") for argument in rest), "results")), path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))


def save(folder: Path, name: str, parts: Sequence[str], figure: Figure) -> list[Path]:
    """Write folder/NAME.md, which shows folder/NAME.png; their paths."""
    page, picture = folder / f"{name}.md", folder / f"{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    partial = picture.with_suffix(".tmp.png")
    try:
        figure.savefig(partial, dpi=120, metadata={"Software": None})
        partial.replace(picture)
    finally:
        partial.unlink(missing_ok=True)
    atomic_write(page, "\n\n".join([*parts, f"![{name}]({picture.name})"]) + "\n")
    return [page, picture]


def save_json(path: Path | None, content: Any) -> None:
    """Write `content` where a path is given."""
    if path is not None:
        atomic_write(path, json.dumps(content, indent=1) + "\n")
