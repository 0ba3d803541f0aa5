"""Artifacts: built once, kept whole, checked before use; locks, scratch folders, arrays on disk."""

from __future__ import annotations

import errno
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from dqbench import stages
from dqbench.shards import Shards, create_array, fill, missing, save_array
from dqbench.stages import MANIFEST, VERSIONS, Store, find_damage, scratch, taking_turns


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(stages, "_verified", set())
    return Store(tmp_path / "cache")


def write(folder: Path) -> None:
    (folder / "content.txt").write_text("what was computed")


def never(folder: Path) -> None:
    raise AssertionError("computed again")


def test_an_artifact_is_built_once_and_named_by_what_it_depends_on(store: Store) -> None:
    first = store.get("samples", {"a": 1, "b": 2}, write)
    again = store.get("samples", {"b": 2, "a": 1}, never)
    assert again == first and (first.folder / "content.txt").read_text() == "what was computed"
    assert store.get("samples", {"a": 1, "b": 3}, write).key != first.key
    assert json.loads((first.folder / MANIFEST).read_text())["depends"] == {
        "version": VERSIONS["samples"],
        "a": 1,
        "b": 2,
    }


def test_a_stage_whose_numbers_change_gets_new_keys(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.get("samples", {}, write)
    monkeypatch.setitem(VERSIONS, "samples", VERSIONS["samples"] + 1)
    assert store.get("samples", {}, write).key != before.key


def test_an_artifact_says_what_built_it_whoever_reads_it(store: Store) -> None:
    Store(store.root, lambda: {"git_commit": "then"}).get("samples", {}, write)
    assert Store(store.root, lambda: {"git_commit": "now"}).get("samples", {}, never).stamp == {"git_commit": "then"}


@pytest.mark.parametrize("damage", ["altered", "truncated", "deleted", "no manifest", "bad manifest"])
def test_a_damaged_artifact_is_built_again(damage: str, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.get("samples", {}, write).folder
    file = folder / "content.txt"
    {
        "altered": lambda: file.write_text("what was compared"),
        "truncated": lambda: file.write_text("what"),
        "deleted": file.unlink,
        "no manifest": (folder / MANIFEST).unlink,
        "bad manifest": lambda: (folder / MANIFEST).write_text("[]"),
    }[damage]()
    assert find_damage(folder)
    stages._verified.clear()
    with caplog.at_level(logging.WARNING):
        store.get("samples", {}, write)
    assert file.read_text() == "what was computed" and find_damage(folder) is None
    assert "is damaged" in caplog.text and "building it again" in caplog.text


def test_a_failed_attempt_is_no_artifact_and_the_next_one_finds_its_scratch(store: Store) -> None:
    def fail(folder: Path) -> None:
        (scratch("units") / "first").write_text("done")
        (scratch("temporary") / "tmp1234").mkdir()
        raise OSError(errno.ENOSPC, "full")

    def resume(folder: Path) -> None:
        assert (scratch("units") / "first").read_text() == "done"
        assert not list(scratch("temporary").iterdir()), "temporary folders of a killed attempt take up space"
        write(folder)

    with pytest.raises(OSError, match="full"):
        store.get("samples", {}, fail)
    assert not [path for path in (store.root / "samples").iterdir() if path.suffix != ".part"]
    artifact = store.get("samples", {}, resume)
    assert artifact.resumed and {path.name for path in artifact.folder.iterdir()} == {"content.txt", MANIFEST}
    assert scratch("units") is None, "outside a stage nothing is kept"


def test_the_second_to_ask_waits_and_finds_it_done(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    started, release = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        started.set()
        assert release.wait(30)
        write(folder)

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.set()

    handler = Telling()
    logging.getLogger("dqbench.stages").addHandler(handler)
    first = threading.Thread(target=store.get, args=("samples", {}, slow))
    first.start()
    assert started.wait(30)
    with caplog.at_level(logging.INFO):
        store.get("samples", {}, never)
    first.join()
    logging.getLogger("dqbench.stages").removeHandler(handler)
    assert "waiting: another process works on samples-" in caplog.text


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), taking_turns(tmp_path, "name"):
        raise ValueError("inside")
    with taking_turns(tmp_path, "name"):
        assert [entry.name for entry in tmp_path.iterdir()] == [".locks"]


def test_fill_writes_what_is_missing_whatever_the_batch_size(tmp_path: Path) -> None:
    asked: list[range] = []

    def produce(rows: range) -> dict[str, np.ndarray]:
        asked.append(rows)
        return {
            "sample": np.arange(rows.start, rows.stop)[:, None] * [1.0, 10.0],
            "other": np.arange(rows.start, rows.stop),
        }

    for first, end in ((2, 5), (5, 11)):
        for name, values in produce(range(first, end)).items():
            Shards(tmp_path, name).write(first, values)
    (tmp_path / "0000002-0000005.done").touch()  # the second batch was cut off before it was marked
    asked.clear()
    fill(tmp_path, 11, 4, produce, "test")
    assert asked == [range(0, 2), range(5, 9), range(9, 11)]
    for name, expected in (("sample", np.arange(11)[:, None] * [1.0, 10.0]), ("other", np.arange(11))):
        array = Shards(tmp_path, name)
        assert len(array) == 11 and np.array_equal(array.read(), expected)
        assert all(np.array_equal(array[i], expected[i]) for i in range(11))


@pytest.mark.parametrize(
    "spans, batches",
    [
        ([], [(0, 3), (3, 6), (6, 7)]),
        ([(0, 7)], []),
        ([(3, 4)], [(0, 3), (4, 7)]),
        ([(0, 1), (6, 7)], [(1, 4), (4, 6)]),
    ],
)
def test_missing_batches(spans: list[tuple[int, int]], batches: list[tuple[int, int]]) -> None:
    assert [(rows.start, rows.stop) for rows in missing(spans, 7, 3)] == batches


def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_array(tmp_path / "a.npy", values)
    rows = create_array(tmp_path / "b.npy", np.dtype(np.float32), (3, 4))
    rows[:] = values
    rows.flush()
    assert np.array_equal(np.load(tmp_path / "a.npy"), values) and np.array_equal(np.load(tmp_path / "b.npy"), values)

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device.*c.npy"):
        save_array(tmp_path / "c.npy", values)
    assert {file.name for file in tmp_path.iterdir()} == {"a.npy", "b.npy"}
