"""The papers' numbers, one YAML per paper: what was printed, how far that is verified, where it stands.

papers() -> names; load(name) -> Paper. A misspelt key, a wrong type, a row that stands twice and a number that is not
finite are refused with the file and the row. Two different values for nominally the same setting both stand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dqbench.config import OFF
from dqbench.errors import UserError, check_choice

FOLDER = Path(__file__).parent
NO_PAPERS = {"metrics", "claims"}  # other files of the folder
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(config=STRICT, frozen=True)
class PublishedMetric:
    """How a published metric is printed."""

    label: str
    better: Literal["lower", "higher"]


@dataclass(config=STRICT, frozen=True)
class PublishedRow:
    """One line of a published table.

    verified: someone read the number in `source` or in the paper; evidence: where it was read, from the paper itself
    (primary) over papers and texts that quote it (secondary, tertiary) to what nobody has checked (memory).
    """

    method: str
    values: dict[str, float]  # metric -> value, keys of metrics.yaml
    verified: bool
    evidence: Literal["primary", "secondary", "tertiary", "memory"]
    w: int | None = None
    a: int | None = None
    label: str | None = None  # where widths do not say it: mixed precision, ...
    calib_samples: int | None = None
    read_from: Literal["image", "vector-figure"] | None = None
    relation: str | None = None  # whose run it is, where not the method's own authors'
    source: str | None = None
    notes: str | None = None

    @property
    def state(self) -> str:
        """primary, secondary, tertiary, or unverified."""
        return self.evidence if self.verified and self.evidence != "memory" else "unverified"

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized."""
        return self.w in OFF and self.a in OFF

    @property
    def bits(self) -> str:
        """w4a8, w4, or the label."""
        widths = "".join(f"{key}{value}" for key, value in (("w", self.w), ("a", self.a)) if value is not None)
        return f"{widths} ({self.label})" if widths and self.label else widths or self.label or "–"


@dataclass(config=STRICT, frozen=True)
class Protocol:
    """How the metrics of a table were measured; None where it is not known."""

    n_samples: int | None = None
    fid_impl: str | None = None
    reference: str | None = None
    notes: str | None = None


@dataclass(config=STRICT, frozen=True)
class Table:
    """Lines of one published table that share a model and a sampler. Several of these may have one table's name."""

    table: str
    caption: str
    rows: list[PublishedRow]
    model: str | None = None
    dataset: str | None = None
    resolution: str | None = None
    sampler: str | None = None
    steps: int | None = None
    eta: float | str | None = None
    guidance: float | None = None
    protocol: Protocol = field(default_factory=Protocol)
    source: str | None = None  # of rows that name none


@dataclass(config=STRICT, frozen=True)
class Paper:
    """A paper and its tables, in the file's order."""

    name: str
    arxiv: str
    venue: str
    tables: list[Table]


def papers(folder: Path = FOLDER) -> list[str]:
    """The names that load() takes."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in NO_PAPERS)


@functools.cache
def load(paper: str, folder: Path = FOLDER) -> Paper:
    """The numbers of a paper; UserError, one line that names the file and the row, where the file is not sound."""
    check_choice("paper", paper, papers(folder))
    path = folder / f"{paper}.yaml"
    content = with_sources(read_yaml(path))
    found = validated(Paper, content, path)
    for table in found.tables:
        check_rows(table, f"{path}: {table.table} ({table.model})")
    return found


@functools.cache
def metrics() -> dict[str, PublishedMetric]:
    """The metrics that rows may hold."""
    path = FOLDER / "metrics.yaml"
    return validated(dict[str, PublishedMetric], read_yaml(path), path)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; UserError with the line where it is none, or where a key stands twice."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader)
        if node is None:
            return None
        check_keys(node)
        return Loader("").construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def check_keys(node: yaml.Node) -> None:
    """Raise for a mapping with a key twice: YAML itself would keep the last."""
    children = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in children:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        children = [value for _, value in children]
    for child in children:
        check_keys(child)


def with_sources(content: Any) -> Any:
    """Rows without a source get their table's."""
    for table in content.get("tables") or [] if isinstance(content, dict) else []:
        for row in table.get("rows") or [] if isinstance(table, dict) and table.get("source") else []:
            row.setdefault("source", table["source"])
    return content


def validated(kind: Any, content: Any, path: Path) -> Any:
    """`content` as dataclasses; UserError that names the place."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))  # in JSON, strict takes mappings
    except ValidationError as error:
        first = error.errors()[0]
        line = f"{path}: {place(content, first['loc'])}: {first['msg']}"
        raise UserError(line) from error


def place(content: Any, keys: Sequence[str | int]) -> str:
    """'tables 2 (Table 1), rows 3 (PTQD w4 a8), w': positions count from 1, with what stands there."""
    parts: list[str] = []
    for key in keys:
        inside = isinstance(content, dict) and key in content or isinstance(content, list) and isinstance(key, int)
        content = content[key] if inside else None
        if isinstance(key, int) and parts:
            parts[-1] += f" {key + 1}{named(content)}"
        else:
            parts.append(str(key))
    return ", ".join(parts) or "the file"


def named(item: Any) -> str:
    """' (PTQD w4 a8)' or ' (Table 2)': how a reader finds it."""
    if not isinstance(item, dict):
        return ""
    words = [item.get("table"), item.get("method"), *(f"{k}{item[k]}" for k in ("w", "a") if k in item)]
    return f" ({' '.join(str(word) for word in words if word)})"


def check_rows(table: Table, where: str) -> None:
    """Raise UserError for a row that stands twice, that has no number, or whose metric is unknown."""
    seen = set()
    for index, row in enumerate(table.rows, start=1):
        what = f"{where}, row {index} ({row.method} {row.bits})"
        if not row.values:
            raise UserError(f"{what} has no values")
        for name in row.values:
            check_choice(f"{what}: metric", name, metrics())
        content = json.dumps(asdict(row), sort_keys=True)
        if content in seen:
            raise UserError(f"{what} stands twice")
        seen.add(content)
