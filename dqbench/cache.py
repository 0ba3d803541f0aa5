"""The artifacts that cells share: list them, check them, delete them.

python -m dqbench.cache [list] [stage=NAME] [results=DIR | cache=DIR] [json=PATH]
python -m dqbench.cache verify                  every checksum; exit status 1 where an artifact is damaged
python -m dqbench.cache prune older=30d         what no cell has used for so long (d or h)
python -m dqbench.cache prune damaged=true      what verify finds; unfinished=true: what killed runs began; all=true
dry=true only tells what prune would delete. A deleted artifact is built again when a cell needs it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqbench.commands import command, split_json
from dqbench.errors import UserError, check_choice
from dqbench.stages import VERSIONS, find_damage

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)
USAGE = (
    "allowed: list | verify | prune older=30d, damaged=true, unfinished=true or all=true, dry=true; "
    "stage=NAME results=DIR cache=DIR json=PATH"
)
USERS = ("run-*", "packed-*")  # locks of what reads artifacts
SECONDS_BETWEEN_LOOKS = 1.0
KEYS = {"list": (), "verify": (), "prune": ("older", "damaged", "unfinished", "all", "dry")}
SECONDS = {"d": 86_400, "h": 3_600}


@dataclass(frozen=True)
class Entry:
    """An artifact, or what a killed run left of one. days: since it was built or last used."""

    stage: str
    key: str
    state: str  # whole | damaged | unfinished | in use
    bytes: int
    days: float
    folder: Path
    damage: str | None


def entries(cache: Path, stage: str = "*", verify: bool = False) -> Iterator[Entry]:
    """The artifacts of a cache by stage and key; with `verify` their checksums are compared."""
    for root in (cache, cache / "reference"):
        for folder in sorted(
            path for path in root.glob(f"{stage}/*") if path.is_dir() and path.parent.name in VERSIONS
        ):
            begun = folder.suffix == ".part"
            with holding(lock_of(folder)) as free:
                damage = find_damage(folder) if verify and free and not begun else None
            state = "in use" if not free else "unfinished" if begun else "damaged" if damage else "whole"
            if size := extent(folder):
                yield Entry(folder.parent.name, folder.stem, state, *size, folder, damage)


def lock_of(folder: Path) -> Path:
    """The lock under which an artifact is built."""
    return folder.parents[1] / ".locks" / f"{folder.parent.name}-{folder.stem}"


def extent(folder: Path) -> tuple[int, float] | None:
    """Bytes of a folder's files, and days since the youngest of them was touched; None where it is gone meanwhile."""
    found = []
    for place, _, files in os.walk(folder):
        for path in (place, *(os.path.join(place, name) for name in files)):
            with suppress(FileNotFoundError):
                found.append(os.stat(path))
    if not found:
        return None
    last, sizes = max(own.st_mtime for own in found), [own.st_size for own in found if not stat.S_ISDIR(own.st_mode)]
    return sum(sizes), max(0.0, time.time() - last) / SECONDS["d"]


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold a lock where no process has it. Yields whether it is free; one that never was, or may not be, taken is."""
    from filelock import FileLock, Timeout

    lock, taken = FileLock(path), False
    if path.exists():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken = True
        except OSError as error:  # another user's cache, or a file system that is only read
            log.debug("%s cannot be locked: %s", path, error)
    try:
        yield not taken
    finally:
        lock.release()


def prune(cache: Path, chosen: Sequence[Entry]) -> int:
    """Delete artifacts. Returns the bytes that this frees. Raises UserError while a run uses the cache."""
    freed, looked = 0, float("-inf")
    for entry in chosen:
        if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:  # a run may start meanwhile
            check_unused(cache)
            looked = time.monotonic()
        with holding(lock_of(entry.folder)) as free:
            if free:
                delete(entry.folder)
                freed += entry.bytes
    return freed


def check_unused(cache: Path) -> None:
    """Raise UserError where a run or an export is using the cache."""
    for lock in sorted(path for pattern in USERS for path in (cache / ".locks").glob(pattern)):
        with holding(lock) as free:
            if not free:
                told = f"{lock.name.replace('-', ' ', 1)} is using {cache}; prune it when nothing does"
                raise UserError(f"{told} (dry=true tells what would go)")


def delete(folder: Path) -> None:
    """Delete a folder; where that is not allowed, a UserError that says so."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be deleted ({error.strerror}); nothing after it was touched") from error


def wanted(given: dict[str, str]) -> Callable[[Entry], bool]:
    """Which entries a prune command means."""
    flags = {key: given[key] for key in ("damaged", "unfinished", "all") if key in given}
    dry = {key: given[key] for key in ("dry",) if key in given}
    wrong = [f"{key}={value}" for key, value in (flags | dry).items() if value != "true"]
    oldest = re.fullmatch(r"(\d+)([dh])", given.get("older", "0d"))
    if wrong or oldest is None or not flags and "older" not in given:
        raise UserError(f"prune {' '.join([*wrong, given.get('older', '')])}".rstrip() + f" is not understood; {USAGE}")
    days = int(oldest[1]) * SECONDS[oldest[2]] / SECONDS["d"]
    return lambda entry: (entry.state in flags or "all" in flags or not flags) and entry.days >= days


def table(found: Sequence[Entry]) -> Table:
    """One line per stage, for rich."""
    from rich.table import Table

    shown = Table("stage", box=None)
    for header in ("artifacts", "MB", "unfinished", "in use", "damaged", "days since use"):
        shown.add_column(header, justify="right", no_wrap=True)
    for stage in dict.fromkeys(entry.stage for entry in found):
        own = [entry for entry in found if entry.stage == stage]
        states = [
            str(sum(entry.state == state for entry in own) or "") for state in ("unfinished", "in use", "damaged")
        ]
        days = f"{min(entry.days for entry in own):.1f}–{max(entry.days for entry in own):.1f}"
        shown.add_row(stage, str(len(own)), megabytes(own), *states, days)
    shown.add_section()
    shown.add_row("all", str(len(found)), megabytes(found))
    return shown


def megabytes(found: Sequence[Entry]) -> str:
    """Their bytes as MB."""
    return f"{sum(entry.bytes for entry in found) / 1e6:,.1f}"


def read(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The verb and its key=value arguments."""
    verb, *rest = [*argv] if argv and "=" not in argv[0] else ["list", *argv]
    given = dict(part.partition("=")[::2] for part in rest)
    known = ("stage", "cache", "results", *KEYS.get(verb, ()))
    unknown = [part for part in rest if "=" not in part or part.partition("=")[0] not in known]
    if verb not in KEYS or unknown:
        raise UserError(f"{unknown[0] if unknown else verb} is not understood; {USAGE}")
    if "stage" in given:
        check_choice("stage", given["stage"], sorted(VERSIONS))
    return verb, given


@command
def main(argv: list[str]) -> None:
    """list, verify or prune."""
    from rich.console import Console

    from dqbench.results import atomic_write

    argv, path = split_json(argv)
    verb, given = read(argv)
    fits = wanted(given) if verb == "prune" else lambda entry: True
    cache = Path(given.get("cache") or Path(given.get("results", "results")) / "cache")
    if not cache.is_dir():
        raise UserError(f"{cache} is no folder; give the cache of your runs as cache=DIR (default: results/cache)")
    found = [
        entry
        for entry in entries(cache, given.get("stage", "*"), verb == "verify" or "damaged" in given)
        if fits(entry)
    ]
    console = Console()
    console.print(table(found))
    for entry in (entry for entry in found if entry.damage):
        console.print(f"damaged: {entry.folder}: {entry.damage}", highlight=False, soft_wrap=True)
    if verb == "prune" and given.get("dry") != "true":
        console.print(f"{prune(cache, found) / 1e6:,.1f} MB freed")
    if path:
        content = [asdict(entry) | {"folder": str(entry.folder)} for entry in found]
        atomic_write(path, json.dumps(content, indent=1) + "\n")
    if verb == "verify" and any(entry.damage for entry in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
