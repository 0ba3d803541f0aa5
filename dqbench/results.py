"""Rows: what a run leaves behind, written atomically, and published into one file that is committed.

python -m dqbench.results publish [run_id ...] [results=DIR]
python -m dqbench.results show [run_id ...] [results=DIR] [json=PATH]
"""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dqbench.commands import command, split_json
from dqbench.errors import UserError

SCHEMA = 1  # of row.json; bumped when a reader of the old form would misread the new one
OPTIONAL = {"difference"}  # fields that rows of this schema may lack
log = logging.getLogger(__name__)


@dataclass
class Row:
    """One finished cell. A metric is {value, low, high, n, extractor, protocol, higher_is_better}."""

    run_id: str
    config: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    reference: dict[str, dict[str, Any]]  # the fp32 row's metrics
    paired: dict[str, dict[str, Any]]  # against the fp32 samples of the same seeds
    cost: dict[str, Any]  # cost.Cost
    timing: dict[str, float]  # calibrate_s, quantize_s, generate_s, score_s, peak_memory_bytes
    provenance: dict[str, Any]
    status: str = "done"  # a cell that failed leaves no row
    difference: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics - reference: {value, low, high}
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)  # groups of curves: diagnostics.curves()

    def write(self, folder: Path | str) -> Path:
        """Write folder/row.json whole or not at all; a full disk leaves no trace. Returns its path."""
        path = Path(folder) / "row.json"
        atomic_write(path, json.dumps(encode(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, folder: Path | str) -> Row:
        """The row of folder/row.json; a damaged or foreign one is a UserError that says so."""
        path = Path(folder) / "row.json"
        if not path.is_file():
            raise UserError(f"no row at {path}: the run has not finished")
        return decode(path.read_bytes(), str(path))


def encode(row: Row) -> dict[str, Any]:
    """The row as strict JSON data, schema first; a number that is not finite is an error that names its field."""
    data = {"schema": SCHEMA, **asdict(row)}
    check_strict(data, "")
    return data


def decode(text: str | bytes, where: str) -> Row:
    """A row from its JSON; `where` names the place in errors."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}): delete it and run again") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise UserError(f"{where} is not a row of dqbench: it has no schema number")
    if data.pop("schema") != SCHEMA:
        raise UserError(f"{where} has another row schema, this version reads {SCHEMA}: use the dqbench that wrote it")
    known = {item.name for item in fields(Row)}
    wrong = (known - OPTIONAL) - data.keys() | data.keys() - known
    if wrong:
        raise UserError(f"{where} is damaged: missing or unknown fields {sorted(wrong)}")
    return Row(**data)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def check_strict(value: Any, name: str) -> None:
    """Raise for what strict JSON cannot hold (NaN, infinities, keys that are not text, tensors), naming the field."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"row field {name}: key {key!r} is not text")
            check_strict(item, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_strict(item, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"row field {name} is {value}: a row holds finite numbers only")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"row field {name} is a {type(value).__name__}: a row holds plain JSON values only")


def atomic_write(path: Path, text: str) -> None:
    """Write text to path through a temporary file beside it, fsync and rename: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; nothing was left half-written") from error
    finally:
        temporary.unlink(missing_ok=True)


def finished(folder: Path | str) -> Row | None:
    """The row of a run that is done, else None: nothing there, or damaged (with a warning, to be run again)."""
    if not (Path(folder) / "row.json").is_file():
        return None
    try:
        return Row.read(folder)
    except UserError as error:
        log.warning("%s", error)
        return None


def runs(results: Path | str) -> Iterator[Row]:
    """The finished rows of results/runs, by run id."""
    folders = sorted(path.parent for path in Path(results).glob("runs/*/row.json"))
    return (row for row in map(finished, folders) if row is not None)


def published(results: Path | str) -> Iterator[Row]:
    """The rows of results/rows.jsonl, in its order; a damaged line is a UserError that names it."""
    path = Path(results) / "rows.jsonl"
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield decode(line, f"{path} line {number}")


def rows(results: Path | str) -> list[Row]:
    """Published rows and finished runs, by run id; where both have one, the run's own."""
    merged = {row.run_id: row for source in (published, runs) for row in source(results)}
    return [merged[run_id] for run_id in sorted(merged)]


def publish(results: Path | str, run_ids: Sequence[str] = ()) -> list[str]:
    """Merge finished rows (all, or those named) into results/rows.jsonl under a lock. Returns the ids of changed lines.

    One JSON per line with sorted keys, lines sorted by run id: the same rows always give the same bytes.
    """
    from filelock import FileLock

    wanted = select(list(runs(results)), run_ids, f"{results}/runs")
    path = Path(results) / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # the system's lock: gone with the process that held it
        before = {row.run_id: _line(row) for row in published(results)}
        after = before | {row.run_id: _line(row) for row in wanted}
        if after != before:
            atomic_write(path, "".join(after[run_id] for run_id in sorted(after)))
    return [row.run_id for row in wanted if before.get(row.run_id) != after[row.run_id]]


def _line(row: Row) -> str:
    return json.dumps(encode(row), sort_keys=True, separators=(",", ":")) + "\n"


def select(found: Sequence[Row], run_ids: Sequence[str], where: str) -> list[Row]:
    """The rows with these ids or unique beginnings of ids (none given: all); else a UserError that lists some."""
    whole = {row.run_id: row for row in found}
    chosen = {} if run_ids else whole
    for name in run_ids:
        matches = [whole[name]] if name in whole else [row for row in found if row.run_id.startswith(name)]
        if len(matches) != 1:
            known = [row.run_id for row in matches or found]
            some = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            raise UserError(f"{len(matches) or 'no'} finished runs are {name} in {where}; there: {some or 'none'}")
        chosen[matches[0].run_id] = matches[0]
    return list(chosen.values())


def main(argv: Sequence[str]) -> None:
    """publish [run_id ...] | show [run_id ...], with results=DIR and, for show, json=PATH."""
    argv, target = split_json(list(argv))
    folder = next((arg.removeprefix("results=") for arg in argv if arg.startswith("results=")), "results")
    name, *run_ids = [arg for arg in argv if not arg.startswith("results=")] or [""]
    if name == "publish" and target is None:
        changed = publish(folder, run_ids)
        print("\n".join([f"{folder}/rows.jsonl: {len(changed)} new or changed rows", *changed]))
    elif name == "show":
        _show(select(rows(folder), run_ids, folder), target)
    else:
        raise UserError("allowed: publish [run_id ...] | show [run_id ...] [json=PATH], both with results=DIR")


def _show(chosen: list[Row], target: Path | None) -> None:
    from dqbench.report import show

    if not chosen:
        raise UserError("no finished run to show: python -m dqbench makes one")
    show(chosen)
    if target is not None:
        atomic_write(target, json.dumps([encode(row) for row in chosen], indent=1) + "\n")


if __name__ == "__main__":
    command(main)()
