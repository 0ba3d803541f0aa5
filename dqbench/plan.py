"""What a run or a sweep would do, before anything runs: cells to run, artifacts they share, operations, time, disk.

python -m dqbench.plan +sweeps=NAME [overrides] [json=PATH]

Nothing is computed, loaded or fetched: the stages of each cell are walked with a store that only takes notes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dqbench.commands import command, split_json
from dqbench.config import compose
from dqbench.errors import UserError
from dqbench.forecast import Note, seconds
from dqbench.identity import run_id
from dqbench.launching.cells import is_finished, without_gpu
from dqbench.launching.checks import check
from dqbench.launching.table import sweep

if TYPE_CHECKING:
    from rich.table import Table

    from dqbench.cost import Walked
    from dqbench.results import Row
    from dqbench.stages import Artifact

SHOWN = {
    "trajectory": "full-precision trajectories",
    "calibration": "calibration sets",
    "quantized": "quantized networks",
    "statistics": "noise statistics",
    "samples": "sample sets",
    "noise_error": "errors of the network",
    "agreement": "agreements with full precision",
}


@dataclass
class Ledger:
    """A store that builds nothing: it notes which artifacts a cell asks for."""

    root: Path
    asked: dict[Path, dict[str, Any]] = field(default_factory=dict)  # folder -> what the artifact depends on

    def get(
        self, stage: str, depends: dict[str, Any], produce: Callable[[Path], None], together: bool = False
    ) -> Artifact:
        """The artifact as it would be named."""
        from dqbench.stages import Artifact, named

        depends, key = named(stage, depends)
        self.asked[self.root / stage / key] = depends
        return Artifact(self.root / stage / key, key, 0.0, False, {})


@dataclass(frozen=True)
class Planned:
    """One cell. seconds: what is left of it, None where no row tells."""

    run_id: str
    overrides: list[str]
    state: str  # done | has a row (without its files here, or forced) | to run | blocked
    reason: str | None  # why it could not start here
    bops: int
    size_bytes: int
    seconds: float | None
    artifacts: dict[Path, int]  # folder -> estimated bytes, 0 where they are small


@dataclass
class Seen:
    """What is known when a cell's turn comes."""

    rows: Sequence[Row]
    artifacts: set[Path] = field(default_factory=set)  # that cells before it ask for
    models: dict[str, Walked] = field(default_factory=dict)  # of cells before it


def plan(arguments: Sequence[str]) -> list[Planned]:
    """The cells of a command line, in the order they would run; each artifact's time is counted where it is built."""
    from dqbench.results import rows

    wanted = {}
    for overrides in sweep(list(arguments)):
        cfg = compose(overrides)
        check(cfg)
        wanted.setdefault(run_id(cfg), (overrides, cfg))
    seen = Seen(rows(Path(next(iter(wanted.values()))[1].paths.results)))
    return [planned(name, overrides, cfg, seen) for name, (overrides, cfg) in wanted.items()]


def planned(name: str, overrides: list[str], cfg: DictConfig, seen: Seen) -> Planned:
    """One cell; what it asks for is added to `seen`."""
    from dqbench.cost import report

    total = report(cfg, seen.models)["total"]
    if is_finished(cfg) and not cfg.runtime.force:
        return Planned(name, overrides, "done", None, total["bops"], total["size_bytes"], 0.0, {})
    asked, reason = walk(cfg)
    state = "blocked" if reason else "has a row" if name in {row.run_id for row in seen.rows} else "to run"
    sizes = {path: note.bytes(total["params"]) for path, note in asked.items()}
    new = [asked[path] for path in asked if path not in seen.artifacts and not path.exists()]
    seen.artifacts |= asked.keys()
    left = seconds(cfg, seen.rows, None if reason else Counter(filter(None, (note.timed for note in new))))
    return Planned(name, overrides, state, reason, total["bops"], total["size_bytes"], left, sizes)


def walk(cfg: DictConfig) -> tuple[dict[Path, Note], str | None]:
    """The artifacts that a cell asks for; or why it could not start here."""
    from dqbench.run import Cell

    try:
        cell = Cell(without_gpu(cfg))  # the cells may run on other machines
    except UserError as error:
        return {}, str(error)
    cell.store = Ledger(Path(cfg.paths.cache))
    quantized = cell.quantize(cell.calibrate())
    for made in (quantized, cell.full_precision):
        cell.generate(made)
    cell.network_error(quantized)
    return {path: Note(path.parent.name, depends, cell) for path, depends in cell.store.asked.items()}, None


def summary(cells: Sequence[Planned], free: int) -> list[str]:
    """What a person wants to know before starting."""
    left = [cell for cell in cells if cell.state != "done"]
    asked_by = Counter(path for cell in left for path in cell.artifacts)
    there = sum(cell.state == "has a row" for cell in left)
    told = f", {there} of them with a row already" if there else ""
    lines = [f"{len(cells)} cells: {len(cells) - len(left)} done, {len(left)} to run{told}"]
    for stage, title in SHOWN.items():
        paths = [path for path in asked_by if path.parent.name == stage]
        if paths:
            there = sum(path.exists() for path in paths)
            wanted = sum(asked_by[path] for path in paths)
            lines.append(f"{title}: {len(paths)} for {wanted} uses, {there} there already")
    sizes = {path: bytes_ for cell in left for path, bytes_ in cell.artifacts.items() if not path.exists()}
    blocked = sum(cell.state == "blocked" for cell in left)
    unseen = f", without {blocked} cells that cannot start here" if blocked else ""
    lines.append(
        f"disk: about {sum(sizes.values()) / 1e6:,.0f} MB more in the cache{unseen}; {free / 1e9:,.1f} GB free"
    )
    known = [cell.seconds for cell in left if cell.seconds is not None]
    unknown = len(left) - len(known)
    if known:
        lines.append(f"time: about {clock(sum(known))} one after the other, by past rows of the same model and method")
    if unknown:
        lines.append(f"time of {unknown} cells: no row of the same model and method tells it")
    return lines


def clock(duration: float) -> str:
    """Seconds as people say them."""
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 90 * 60 else f"{duration / 3600:.1f} h"


def table(cells: Sequence[Planned]) -> Table:
    """One line per cell, for rich; what all cells share stands in the title."""
    from rich.table import Table

    shared = [part for part in cells[0].overrides if all(part in cell.overrides for cell in cells)] if cells[1:] else []
    shown = Table("run", "cell", box=None, title=" ".join(shared) or None, title_justify="left")
    for header in ("GBOPs", "MB", "time", "state"):
        shown.add_column(header, justify="right", no_wrap=True)
    for cell in cells:
        left = "–" if cell.seconds is None else clock(cell.seconds)
        name = " ".join(part for part in cell.overrides if part not in shared) or "the default"
        shown.add_row(cell.run_id, name, f"{cell.bops / 1e9:,.2f}", f"{cell.size_bytes / 1e6:,.2f}", left, cell.state)
    return shown


def place(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


@command
def main(argv: list[str]) -> None:
    """Print the plan of a command line; with json=PATH also write it there."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan fetches nothing
    from rich.console import Console

    from dqbench.results import atomic_write

    arguments, path = split_json([argument for argument in argv if argument not in ("-m", "--multirun")])
    cells = plan(arguments)
    console = Console()
    console.print(table(cells))
    free = shutil.disk_usage(place(Path(compose(cells[0].overrides).paths.cache))).free
    for line in summary(cells, free):
        console.print(line, highlight=False)
    for reason in dict.fromkeys(cell.reason for cell in cells if cell.reason):
        console.print(f"cannot start here: {reason}", highlight=False, soft_wrap=True)
    if path:
        content = [asdict(cell) | {"artifacts": {str(at): own for at, own in cell.artifacts.items()}} for cell in cells]
        atomic_write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
