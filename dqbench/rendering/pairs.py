"""Published rows paired with ours: by the run ids that a preset's overrides give, at both scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dqbench import published
from dqbench.comparison import full_precision, settings
from dqbench.errors import check_choice
from dqbench.identity import digest
from dqbench.launching.table import SCALES
from dqbench.published import PublishedRow
from dqbench.rendering.cells import Axes, RunIds, axis, key_of, model_of
from dqbench.rendering.presets import DELTA, Preset, names
from dqbench.results import Row

MINI, FULL = SCALES


@dataclass(frozen=True)
class Pair:
    """A published row and our rows of its cell, by rising seed, at each scale; none where the cell has not run."""

    published: PublishedRow
    ours: dict[str, list[Row]]
    reason: str = ""  # why there is no cell


@dataclass(frozen=True)
class Part:
    """One published table of a preset: a model and a sampler."""

    table: published.Table
    pairs: list[Pair]
    base: PublishedRow | None  # the paper's own full precision
    base_table: str = ""  # where that stands, if elsewhere in the paper
    metrics: dict[str, dict[str, str]] = field(default_factory=dict)  # scale -> published metric -> ours
    mini_notes: Sequence[str] = ()  # in what the miniature's cells differ from the method as published


def pair(preset: Preset, rows: Sequence[Row], ids: RunIds) -> list[Part]:
    """The published tables of a preset with our rows."""
    finder = Finder(preset, {row.run_id: row for row in rows}, {row.config["model"].get("name") for row in rows}, ids)
    full = [row for row in rows if row.config["method"].get("name") == "fp32"]
    parts = []
    for table in preset.tables:
        base, name = full_precision_row(preset, table)
        pairs = with_full_precision(list(finder.pairs(table)), full)
        mapped = {scale: ours(preset, scale, table) for scale in SCALES}
        parts.append(Part(table, pairs, base, name, mapped, preset.axes.mini_notes))
    for scale, key in ((MINI, "mini_metrics"), (FULL, "metrics")):
        check_measured(f"{preset.name}.yaml: table.{key}", scale, parts)
    return parts


def check_measured(where: str, scale: str, parts: Sequence[Part]) -> None:
    """Raise UserError for a metric of ours that none of the rows there are has: nothing would stand in its column."""
    there = [row for part in parts for each in part.pairs for row in each.ours[scale]]
    known = sorted({name for row in there for name in row.metrics | row.paired})
    for name in {own for part in parts for own in part.metrics[scale].values()} if there else ():
        check_choice(where, name, known)


def ours(preset: Preset, scale: str, table: published.Table) -> dict[str, str]:
    """Published metric -> ours; what is published as a change of a metric stands beside that metric."""
    mapping = preset.axes.mini_metrics if scale == MINI else preset.axes.metrics
    published_names = dict.fromkeys(name for row in table.rows for name in row.values)
    return {name: mapping[key] for name in published_names if (key := name.removeprefix(DELTA)) in mapping}


def full_precision_row(preset: Preset, table: published.Table) -> tuple[PublishedRow | None, str]:
    """The table's own row of full precision; else the paper's of the same model and sampler, and where it stands."""
    keys = ("model", "dataset", "resolution", "steps", "eta", "guidance")
    alike = [other for other in preset.paper.tables if all(getattr(other, k) == getattr(table, k) for k in keys)]
    for other in (table, *alike):
        for row in other.rows:
            if row.full_precision:
                return row, "" if other is table else other.table
    return None, ""


def with_full_precision(pairs: list[Pair], full: Sequence[Row]) -> list[Pair]:
    """Full precision of every seed that is at hand: of `full`, else what the quantized rows of the seed hold of it."""
    result = []
    for each in pairs:
        ours = dict(each.ours)
        for scale in SCALES if each.published.full_precision else ():
            ours[scale] = completed(ours[scale], [row for other in pairs for row in other.ours[scale]], full)
        result.append(Pair(each.published, ours, each.reason))
    return result


def completed(own: list[Row], others: Sequence[Row], full: Sequence[Row]) -> list[Row]:
    """Rows of full precision, all that `full` and the others of equal settings hold, by rising seed."""
    every = [*own, *others]
    if not every:
        return []
    kind = digest(settings(every[0]))
    alike = [row for row in every if digest(settings(row)) == kind]
    found = {row.config["seed"]: full_precision(row) for row in reversed(alike) if row.difference or row.paired}
    found |= {row.config["seed"]: row for row in full if digest(settings(row)) == kind}
    found |= {row.config["seed"]: row for row in own}
    return [found[seed] for seed in sorted(found)]


@dataclass(frozen=True)
class Finder:
    """Looks up the rows of a preset's cells."""

    preset: Preset
    rows: Mapping[str, Row]
    models: set[str | None]  # that any row is of
    ids: RunIds

    def pairs(self, table: published.Table) -> Iterator[Pair]:
        """Every published row of a table with ours."""
        axes = self.preset.axes
        for row in table.rows:
            wanted = axes.overrides(row.method, row.label) or (["method=fp32"] if row.full_precision else [])
            ours = {scale: self.find(scale, table, row, wanted) if wanted else [] for scale in SCALES}
            reason = next((axes.missing[name] for name in names(row) if name in axes.missing), "")
            yield Pair(row, ours, reason or ("" if wanted else "no cell of ours"))

    def find(self, scale: str, table: published.Table, row: PublishedRow, wanted: list[str]) -> list[Row]:
        """Our rows by rising seed; full precision is one run at whatever bits."""
        axes = {key: axis(key, value) for key, value in (getattr(self.preset.axes, scale) or {}).items()}
        setting = self.preset.setting(scale, table)
        if setting is None or model_of(setting) not in self.models:
            return []
        if wanted == ["method=fp32"] and wanted[0] not in axes.get("method", ()):
            return []  # what quantized rows hold of it stands for it
        wanted = [f"setting={setting}", *wanted]
        if any(key_of(override) in axes and override not in axes[key_of(override)] for override in wanted):
            return []
        cells = [self.ids.of(self.preset.name, scale, wanted, bits, axes) for bits in self.bits(axes, row)]
        named = [name for cell in cells for name in cell]
        found = {each.config["seed"]: each for name in reversed(named) if (each := self.rows.get(name))}
        return [found[seed] for seed in sorted(found)]

    def bits(self, axes: Axes, row: PublishedRow) -> list[str]:
        """The choices of bits that stand for a row's; where it has no widths, the sweep's first."""
        swept = [override.partition("=")[2] for override in axes.get("bits", ())]
        if row.full_precision:
            return swept
        if None in (row.w, row.a):
            return swept[:1]
        name = self.preset.axes.bits.get(f"w{row.w}a{row.a}", f"w{row.w}a{row.a}")
        return [name] if name in swept else []
