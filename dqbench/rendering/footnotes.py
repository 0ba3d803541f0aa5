"""What is said under a published table beside ours: protocol, differences of protocol, notes, status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dqbench import published
from dqbench.launching.table import SCALES
from dqbench.published import PublishedRow
from dqbench.rendering.pairs import FULL, MINI, Pair, Part
from dqbench.rendering.protocol import MEASURE, Difference, differences

WORDS = {MINI: "miniature", FULL: "reproduced"}
READ = {"image": "read from a picture of the table", "vector-figure": "measured in a vector figure"}


@dataclass
class Notes:
    """Footnotes in the order in which they are first needed."""

    texts: list[str] = field(default_factory=list)

    def number(self, texts: Iterable[str]) -> tuple[int, ...]:
        """The numbers of some footnotes."""
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        return tuple(sorted(self.texts.index(text) + 1 for text in dict.fromkeys(texts)))


def status(part: Part, pair: Pair) -> str:
    """reproduced, other protocol, miniature or not run; the first two and a miniature may both be there."""
    words = []
    if pair.ours[FULL]:
        decisive = any(each.decisive for each in against(part, pair, FULL))
        words.append("full scale, other protocol" if decisive else "reproduced")
    if pair.ours[MINI]:
        words.append("miniature")
    return ", ".join(words) or "not run"


def against(part: Part, pair: Pair, scale: str, metric: str | None = None) -> list[Difference]:
    """How our rows at a scale differ from the published one; metric: as far as that published metric is concerned."""
    rows, mapping = pair.ours[scale], part.metrics[scale]
    mapping = {name: own for name, own in mapping.items() if metric in (None, name)}
    found = [each for row in rows for each in differences(part.table, pair.published, row, mapping, scale == MINI)]
    return list(dict.fromkeys(found))


def located(part: Part, pair: Pair) -> list[tuple[str, Difference]]:
    """Differences of protocol with the scale at which they are."""
    return [(scale, each) for scale in reversed(SCALES) for each in against(part, pair, scale)]


def common_differences(part: Part) -> list[tuple[str, Difference]]:
    """Those of all pairs that have run at a scale; a metric's own of all that have it measured."""
    every = [(pair, located(part, pair)) for pair in part.pairs]
    found = []
    for scale, each in dict.fromkeys(item for _, items in every for item in items):
        own = each.topic.startswith(MEASURE)
        rivals = [items for pair, items in every if pair.ours[scale]]
        rivals = [items for items in rivals if not own or any(other.topic == each.topic for _, other in items)]
        found += [(scale, each)] if all((scale, each) in items for items in rivals) else []
    return found


def shared(lists: Sequence[list[Any]]) -> list[Any]:
    """What all of several lists hold, in order."""
    return [item for item in lists[0] if all(item in other for other in lists)] if lists else []


def own_notes(part: Part, row: PublishedRow) -> list[str]:
    """What is said of a published row and not of all of its table; whose run it is."""
    common = common_notes(part)
    texts = [row.relation or "", *(text for text in said(row) if text not in common)]
    return [text for text in texts if text]


def said(row: PublishedRow) -> list[str]:
    """What is known of how a row came about."""
    calib = f"{row.calib_samples} calibration samples" if row.calib_samples is not None else ""
    return [text for text in (row.notes, READ.get(row.read_from or ""), calib) if text]


def common_notes(part: Part) -> list[str]:
    """What is said of every row of a table."""
    return shared([said(row) for row in part.table.rows])


def remarks(part: Part) -> list[str]:
    """What holds for every published row: the protocol, where full precision stands, notes."""
    protocol = part.table.protocol
    count = "number of samples not known" if protocol.n_samples is None else f"{protocol.n_samples:,} samples"
    known = [count, *(f"{what}: {text}" for what, text in measured_by(protocol) if text), protocol.notes]
    found = [f"Published protocol: {'; '.join(text.rstrip('.') for text in known if text)}."]
    if part.base_table and any(name in part.base.values for row in part.table.rows for name in row.values):
        found.append(f"Δ fp of published numbers: against the full precision of {part.base_table}.")
    if any(pair.ours[MINI] for pair in part.pairs):
        found += [f"Miniature: {text}." for text in part.mini_notes]
    return found + [f"All published rows: {text}." for text in common_notes(part)]


def measured_by(protocol: published.Protocol) -> list[tuple[str, str | None]]:
    """What measured a published table, and against what."""
    return [("implementation", protocol.fid_impl), ("reference", protocol.reference)]


def sources(part: Part) -> list[str]:
    """Where the published numbers were read, each once."""
    return list(dict.fromkeys(row.source for row in part.table.rows if row.source))


def runs(part: Part) -> Iterable[tuple[str, int, str]]:
    """Which runs our numbers are of; full precision that quantized rows hold has none of its own."""
    for pair in part.pairs:
        for scale, rows in pair.ours.items():
            what = f"{pair.published.method} {pair.published.bits}, {WORDS[scale]}"
            yield from ((what, row.config["seed"], row.run_id) for row in rows if row.run_id)
