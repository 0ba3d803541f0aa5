"""A published table beside ours as a grid of cells that every format can print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dqbench import published
from dqbench.launching.table import SCALES
from dqbench.metrics.text import decimals
from dqbench.published import PublishedRow
from dqbench.rendering.estimates import Estimate, change, estimate, measured
from dqbench.rendering.footnotes import (
    WORDS,
    Notes,
    common_differences,
    located,
    own_notes,
    remarks,
    runs,
    sources,
    status,
)
from dqbench.rendering.pairs import MINI, Pair, Part
from dqbench.rendering.presets import DELTA
from dqbench.rendering.protocol import Difference

NONE = "–"
Named = Sequence[tuple[str, list[str]]]  # published metrics and the scales at which we have them


@dataclass(frozen=True)
class Cell:
    """A text; how far a published number is verified; numbers of the footnotes that belong to it."""

    text: str
    state: str = ""
    notes: tuple[int, ...] = ()
    link: str = ""


@dataclass(frozen=True)
class Column:
    """group: what stands over neighbouring columns."""

    group: str
    name: str
    number: bool = True


@dataclass(frozen=True)
class View:
    """One part of a page."""

    title: str
    part: Part
    columns: list[Column]
    lines: list[list[Cell]]
    notes: list[str]  # numbered from 1
    remarks: list[str]  # of every row
    protocol: list[tuple[str, Difference]]  # scale and difference, of all of our rows
    sources: list[str]
    runs: list[tuple[str, int, str]]  # "qdiffusion w4a8, miniature", seed, run id
    statuses: list[str]  # of each line


def look(part: Part) -> View:
    """The grid of a part."""
    named = [(name, scales_of(part, name)) for name in metric_names(part)]
    columns = [Column("", name, False) for name in ("method", "bits", "status")] + [Column("", "n")]
    for name, scales in named:
        columns += metric_columns(part, name, scales)
    notes, common = Notes(), common_differences(part)
    lines = [line(part, pair, named, notes, common) for pair in part.pairs]
    return View(
        title=heading(part.table),
        part=part,
        columns=columns,
        lines=lines,
        notes=notes.texts,
        remarks=remarks(part),
        protocol=common,
        sources=sources(part),
        runs=list(runs(part)),
        statuses=[status(part, pair) for pair in part.pairs],
    )


def heading(table: published.Table) -> str:
    """'LDM-4, LSUN-Bedrooms, 256x256, DDIM 200 steps, eta 1'."""
    steps = f"{table.steps} steps" if table.steps else ""
    sampler = " ".join(filter(None, (table.sampler, steps)))
    words = [table.model, table.dataset, table.resolution, sampler]
    words += [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in (("eta", table.eta), ("guidance", table.guidance))
        if value is not None
    ]
    return ", ".join(word for word in words if word) or table.caption


def metric_names(part: Part) -> list[str]:
    """Published metrics: those that we measure first."""
    names = list(dict.fromkeys(name for row in part.table.rows for name in row.values))
    ours = {name for mapping in part.metrics.values() for name in mapping}
    return sorted(names, key=lambda name: (name not in ours, names.index(name)))


def scales_of(part: Part, name: str) -> list[str]:
    """The scales at which any of our rows has a metric."""
    return [
        scale
        for scale in reversed(SCALES)
        if any(estimate(pair.ours[scale], part.metrics[scale].get(name)) for pair in part.pairs)
    ]


def metric_columns(part: Part, name: str, scales: Sequence[str]) -> list[Column]:
    """Published, its change, ours, its change. Ours stand under their own name."""
    shown = published.metrics()[name]
    group = f"{shown.label} {'↑' if shown.better == 'higher' else '↓'}"
    columns = [Column(group, "published")]
    if has_change(part, name):
        columns.append(Column(group, "Δ fp"))
    for scale in scales:
        own = part.metrics[scale][name]
        metric = next(found for pair in part.pairs for row in pair.ours[scale] if (found := measured(row, own)))
        over = f"{own} {'↑' if metric['higher_is_better'] else '↓'}"
        columns.append(Column(over, WORDS[scale]))
        if any(change(pair.ours[scale], own) for pair in part.pairs):
            columns.append(Column(over, "Δ fp" + " " * (scale == MINI)))
    return columns


def has_change(part: Part, name: str) -> bool:
    """Whether a published metric, one that we measure too, can be held against the paper's own full precision."""
    ours = any(name in mapping for mapping in part.metrics.values())
    return ours and part.base is not None and name in part.base.values


def line(part: Part, pair: Pair, named: Named, notes: Notes, common: Sequence[tuple[str, Difference]]) -> list[Cell]:
    """The cells of a published row."""
    row = pair.published
    apart = [f"{WORDS[scale]}: {each}" for scale, each in located(part, pair) if (scale, each) not in common]
    reasons = notes.number([*filter(None, [pair.reason]), *apart])
    cells = [Cell(row.method, notes=notes.number(own_notes(part, row))), Cell(row.bits)]
    cells += [Cell(status(part, pair), notes=reasons), Cell(counts(pair))]
    for name, scales in named:
        cells += published_cells(part, row, name)
        for scale in scales:
            own = part.metrics[scale][name]
            rows = pair.ours[scale] if name in row.values or not name.startswith(DELTA) else []
            cells.append(Cell(spell(estimate(rows, own))))
            if any(change(other.ours[scale], own) for other in part.pairs):
                cells.append(Cell(spell(change(rows, own), "+")))
    return cells


def published_cells(part: Part, row: PublishedRow, name: str) -> list[Cell]:
    """The published number and its distance from the paper's own full precision."""
    value, digits = row.values.get(name), places(part, name)
    link = row.source if row.source and row.source.startswith("http") else ""
    cells = [Cell(NONE) if value is None else Cell(f"{value:.{digits}f}", row.state, link=link)]
    if has_change(part, name):
        moved = published_change(part, row, name)
        cells.append(Cell(NONE) if moved is None else Cell(f"{moved:+.{digits}f}", weakest(part, row)))
    return cells


def weakest(part: Part, row: PublishedRow) -> str:
    """How far a published change is verified: as far as both of its numbers."""
    return "unverified" if part.base and part.base.state == "unverified" else row.state


def published_change(part: Part, row: PublishedRow, name: str) -> float | None:
    """A published number minus the paper's own full precision, to its decimals; None for full precision itself."""
    if row.full_precision or name not in row.values or part.base is None or name not in part.base.values:
        return None
    return round(row.values[name] - part.base.values[name], places(part, name))


def places(part: Part, name: str) -> int:
    """Decimals of a column: the most that any of its numbers was printed with."""
    rows = [*part.table.rows, *([part.base] if part.base else [])]
    printed = [f"{row.values[name]:.10f}".rstrip("0") for row in rows if name in row.values]
    return max(len(text.partition(".")[2]) for text in printed)


def spell(found: Estimate | None, sign: str = "") -> str:
    """'0.52 [0.29, 0.74]'."""
    if found is None:
        return NONE
    shown = decimals(max(abs(found.value), abs(found.high - found.low) / 2))
    return f"{found.value:{sign}.{shown}f} [{found.low:{sign}.{shown}f}, {found.high:{sign}.{shown}f}]"


def counts(pair: Pair) -> str:
    """'1,024 × 3': samples of a seed and seeds; of both scales where both have run."""
    found = []
    for scale in reversed(SCALES):
        if rows := pair.ours[scale]:
            n = rows[0].config["sampler"]["num_samples"]
            found.append(f"{n:,}" + (f" × {len(rows)}" if len(rows) > 1 else ""))
    return "; ".join(found) or NONE
