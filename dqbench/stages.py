"""Artifacts: folders named by the hash of what they depend on, built once, shared by cells, resumed after a kill.

A stage builds in `<key>.part`, which survives a kill, and is renamed to `<key>` when complete, with a manifest of
checksums. Two runs that want the same artifact take turns at a lock; the second finds it done. Of the processes of one
run (processes.py) the main one holds the locks, looks, completes and renames.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dqbench import processes
from dqbench.identity import digest
from dqbench.progress import tell_launcher
from dqbench.results import atomic_write

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SHARED = 0o666  # mode of a lock file: users of one cache take turns, too
VERSIONS = {  # part of every key: bumped when what a stage computes from the same input changes
    "trajectory": 2,
    "calibration": 2,
    "quantized": 3,
    "statistics": 1,
    "samples": 2,
    "scores": 3,
    "noise_error": 2,
    "agreement": 1,
    "predictions": 1,
    "features": 1,
}
_part: ContextVar[Path | None] = ContextVar("part", default=None)
_verified: set[Path] = set()


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, its key (hash of what it depends on), the seconds its (last) building took."""

    folder: Path
    key: str
    seconds: float
    resumed: bool  # an earlier, killed attempt had done a part, whose seconds are not counted
    stamp: dict[str, Any]  # what built it: code, libraries, device


@dataclass(frozen=True)
class Store:
    """The artifacts of all stages under one root folder; `stamp()` says what builds them."""

    root: Path
    stamp: Callable[[], dict[str, Any]] = dict

    def get(
        self, stage: str, depends: dict[str, Any], produce: Callable[[Path], None], together: bool = False
    ) -> Artifact:
        """The artifact of `stage` for `depends` (JSON-able); built by `produce(folder)` unless it is whole.

        Of several processes the main one produces; `together`: all call `produce`, which divides the work.
        """
        depends, key = named(stage, depends)
        folder = self.root / stage / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with taking_turns(self.root, f"{stage}-{key}"):
            refresh(folder.parent)
            if not processes.agreed(lambda: self._is_whole(folder)):
                self._build(folder, depends, produce, together)
        manifest = json.loads((folder / MANIFEST).read_text())
        with suppress(OSError):  # a cache that may only be read
            os.utime(folder / MANIFEST)  # dqbench.cache tells by it when an artifact was last used
        return Artifact(folder, key, manifest["seconds"], manifest["resumed"], manifest["stamp"])

    def _is_whole(self, folder: Path) -> bool:
        if folder in _verified or not folder.exists():
            return folder.exists()
        if damage := find_damage(folder):
            log.warning("artifact %s is damaged (%s): building it again", folder, damage)
            shutil.rmtree(folder)
            return False
        _verified.add(folder)
        return True

    def _build(self, folder: Path, depends: dict[str, Any], produce: Callable[[Path], None], together: bool) -> None:
        part = folder.with_suffix(".part")
        resumed, started = processes.agreed(lambda: open_part(part)), time.perf_counter()
        with resuming(part):
            produce(part) if together else processes.agreed(lambda: produce(part))
        processes.wait()
        content = {"depends": depends, "resumed": resumed, "seconds": round(time.perf_counter() - started, 3)}
        processes.agreed(lambda: self._complete(folder, part, content))

    def _complete(self, folder: Path, part: Path, content: dict[str, Any]) -> None:
        shutil.rmtree(part / "scratch", ignore_errors=True)
        content |= {"stamp": self.stamp(), "files": checksums(part)}
        atomic_write(part / MANIFEST, json.dumps(content, indent=1, sort_keys=True))
        part.rename(folder)
        _verified.add(folder)


def named(stage: str, depends: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """All that an artifact of `stage` depends on, and the key that this gives it."""
    depends = {"version": VERSIONS[stage], **depends}
    return depends, digest(depends)


@contextmanager
def taking_turns(root: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of the cache `root`; the system lets go of it when the process dies, however it dies.

    Of several processes of one run the main one holds it; the others go on, to where they wait for what it decides.
    """
    if not processes.is_main():
        yield
        return
    folder = root / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name, mode=SHARED)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting: another process works on %s", name)
        tell_launcher("waiting for another cell")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refresh(folder: Path) -> None:
    """Make a network file system forget what it remembers of the folder: another machine may have put something there.

    Without this a client may take a file for missing that was made half a minute ago.
    """
    with suppress(OSError):  # not there, or another user's: then what is remembered has to do
        os.utime(folder)


def open_part(part: Path) -> bool:
    """Make the folder of an attempt, or go on in a killed one's: True, and its temporary folders are deleted."""
    resumed = part.exists()
    part.mkdir(exist_ok=True)
    for folder in (part / "scratch").glob("*/tmp*"):
        shutil.rmtree(folder)
    return resumed


@contextmanager
def resuming(part: Path) -> Iterator[None]:
    """Make `part` the folder that scratch() and checkpointed work of the current stage use."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def scratch(name: str) -> Path | None:
    """A folder of the current stage for unfinished work, kept after a kill; None outside a stage."""
    if (part := _part.get()) is None:
        return None
    folder = part / "scratch" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checksums(folder: Path) -> dict[str, list[Any]]:
    """Relative path -> [bytes, SHA-256] of every file below `folder`, the manifest excepted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}


def find_damage(folder: Path) -> str | None:
    """What is wrong with an artifact's files, or None."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {type(error).__name__}"
    found = checksums(folder)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"{wrong[0]}: missing or altered" if wrong else None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
