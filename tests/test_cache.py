"""python -m dqbench.cache: what it lists, finds damaged, deletes, and never deletes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dqbench import stages
from dqbench.cache import entries, main
from dqbench.stages import MANIFEST, Store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two artifacts, one of a killed run, and one in the store of reference statistics."""
    monkeypatch.setattr(stages, "_verified", set())
    root = tmp_path / "cache"
    for stage, content in (("trajectory", "12345"), ("samples", "678")):
        Store(root).get(stage, {"content": content}, lambda part, text=content: (part / "rows.txt").write_text(text))
    Store(root / "reference").get("features", {}, lambda part: (part / "rows.txt").write_text("features"))
    (root / "samples" / "0123456789ab.part").mkdir()
    return root


def states(cache: Path, **options) -> dict[str, str]:
    return {f"{entry.stage}{'.part' * (entry.folder.suffix != '')}": entry.state for entry in entries(cache, **options)}


def call(cache: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["cache", *arguments, f"cache={cache}"])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_every_artifact_is_listed_with_its_bytes_and_age(cache, monkeypatch, tmp_path):
    target = tmp_path / "list.json"
    assert call(cache, f"json={target}", monkeypatch=monkeypatch) == 0
    found = {entry["stage"]: entry for entry in json.loads(target.read_text()) if entry["state"] == "whole"}
    assert set(found) == {"trajectory", "samples", "features"}
    for entry in found.values():
        assert entry["bytes"] == sum(path.stat().st_size for path in Path(entry["folder"]).iterdir())
        assert 0 <= entry["days"] < 0.01 and Path(entry["folder"]).name == entry["key"]
    assert states(cache)["samples.part"] == "unfinished"
    monkeypatch.setattr(sys, "argv", ["cache", f"results={cache.parent}", f"json={tmp_path / 'same.json'}"])
    main()
    keys = [[entry["key"] for entry in json.loads(path.read_text())] for path in (target, tmp_path / "same.json")]
    assert keys[0] == keys[1]


def test_verify_finds_an_altered_file_and_prune_deletes_only_that(cache, monkeypatch, capsys):
    assert call(cache, "verify", monkeypatch=monkeypatch) == 0
    next(cache.glob("trajectory/*/rows.txt")).write_text("12346")
    assert states(cache)["trajectory"] == "whole" and states(cache, verify=True)["trajectory"] == "damaged"
    assert call(cache, "verify", monkeypatch=monkeypatch) == 1
    assert "rows.txt: missing or altered" in capsys.readouterr().out
    assert call(cache, "prune", "damaged=true", monkeypatch=monkeypatch) == 0
    assert states(cache, verify=True) == {"samples": "whole", "samples.part": "unfinished", "features": "whole"}


def test_use_keeps_an_artifact_from_being_pruned_by_age(cache, monkeypatch):
    long_ago = time.time() - 40 * 86_400
    for path in [*cache.glob("*/*"), *cache.glob("*/*/*"), *cache.glob("reference/*/*/*")]:
        os.utime(path, (long_ago, long_ago))
    Store(cache).get("samples", {"content": "678"}, None)
    before = states(cache)
    assert call(cache, "prune", "older=30d", "dry=true", monkeypatch=monkeypatch) == 0 and states(cache) == before
    assert call(cache, "prune", "older=30d", monkeypatch=monkeypatch) == 0
    assert states(cache) == {"samples": "whole"}


def test_what_a_process_works_on_stays(cache, monkeypatch, capsys):
    (manifest,) = cache.glob(f"trajectory/*/{MANIFEST}")
    with FileLock(cache / ".locks" / f"trajectory-{manifest.parent.name}"):
        assert states(cache)["trajectory"] == "in use"
        assert call(cache, "prune", "all=true", monkeypatch=monkeypatch) == 0
        assert states(cache) == {"trajectory": "in use"}
    with FileLock(cache / ".locks" / "run-feedbeef0123"):
        assert call(cache, "prune", "all=true", monkeypatch=monkeypatch) == 2
        assert "run feedbeef0123 is using" in capsys.readouterr().err and manifest.exists()
    assert call(cache, "prune", "unfinished=true", "stage=samples", monkeypatch=monkeypatch) == 0
    assert states(cache) == {"trajectory": "whole"}


def test_a_cache_that_may_only_be_read_is_listed_and_not_pruned(cache, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert states(cache)["trajectory"] == "whole"
    assert call(cache, "prune", "all=true", monkeypatch=monkeypatch) == 2
    assert "cannot be deleted (Read-only file system)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["purge"], ["prune"], ["prune", "older=3x"], ["prune", "damaged=yes"], ["list", "all=true"], ["x=1"]),
        *(["prune", "all=true", "dry"], ["prune", "all=true", "dry=True"]),
    ],
)
def test_bad_input_is_one_line_and_deletes_nothing(arguments, cache, monkeypatch, capsys):
    before = states(cache)
    assert call(cache, *arguments, monkeypatch=monkeypatch) == 2 and states(cache) == before
    error = capsys.readouterr().err
    assert "is not understood; allowed: list | verify | prune" in error and error.count("\n") == 1
    assert call(cache / "none", monkeypatch=monkeypatch) == 2


def test_a_stage_that_is_none_is_told_with_those_there_are(cache, monkeypatch, capsys):
    assert call(cache, "prune", "all=true", "stage=sampels", monkeypatch=monkeypatch) == 2
    assert "stage=sampels is unknown; allowed: " in capsys.readouterr().err


def test_what_vanishes_while_it_is_looked_at_is_not_listed(cache, monkeypatch):
    first, *rest = entries(cache)
    monkeypatch.setattr("dqbench.cache.lock_of", lambda folder: shutil.rmtree(first.folder, True) or folder / "none")
    assert [entry.folder for entry in entries(cache)] == [entry.folder for entry in rest]
