"""What the claims page says, as text: a line for each comparison, verdicts by paper, what is left to run."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dqbench.claims.book import Claim, titles
from dqbench.claims.verdicts import CONTRARY, LEVEL, NOT_RUN, SHOWN, VERDICTS, Effect, Result
from dqbench.comparison import title as place

COST = {"bops": "BOPs", "bits_per_weight": "bits/weight", "bits_per_act": "bits/act"}


@dataclass(frozen=True)
class Sheet:
    """A paper's claims as text: one line for each comparison."""

    title: str
    where: str  # model, sampler and samples of the rows, or that there are none
    header: list[str]
    lines: list[list[str]]


def sheets(results: Sequence[Result]) -> list[Sheet]:
    """One for each paper that makes claims, in the book's order."""
    by_paper: dict[str, list[Result]] = {}
    for result in results:
        by_paper.setdefault(result.comparison.claim.paper, []).append(result)
    names = titles()
    return [sheet(names[paper], own) for paper, own in by_paper.items()]


def sheet(title: str, results: Sequence[Result]) -> Sheet:
    """Columns are the metrics of any of the claims; a claim is told once, above its further cases."""
    metrics = dict.fromkeys(effect.metric for result in results for effect in result.effects)
    known = [effect for result in results for effect in result.effects if effect.effect is not None]
    arrows = {effect.metric: " ↑" if effect.higher_is_better else " ↓" for effect in known}
    header = ["claim", "source", "case", "seeds", "verdict", *(name + arrows.get(name, "") for name in metrics), "cost"]
    lines, last = [], None
    for result in results:
        claim = result.comparison.claim
        told = [claim.statement, claim.source] if claim is not last else ["", ""]
        effects = {effect.metric: cell(effect) for effect in result.effects}
        values = [effects.get(name, "") for name in metrics]
        lines.append([*told, result.comparison.case, seeds(result), verdict(result), *values, cost(result)])
        last = claim
    return Sheet(title, where(results), header, lines)


def where(results: Sequence[Result]) -> str:
    """'On digits_ddpm, DDIM 50 steps, 1,024 samples.'"""
    places = sorted({place(row) for result in results for row in result.treatment.values()})
    return f"On {'; '.join(places)}." if places else "No rows to compare yet."


def cell(effect: Effect) -> str:
    """'+0.34 ± 0.06, p 0.0008, shown'."""
    if effect.effect is None:
        return "–"
    if effect.p is None:
        return f"{effect.effect:+.4g} at every seed, {effect.verdict}"
    half = (effect.high - effect.low) / 2
    places = max(0, min(6, 1 - math.floor(math.log10(half))))
    p = f"{effect.p:.1g}" if effect.p < 0.001 else f"{effect.p:.3f}"
    return f"{effect.effect:+.{places}f} ± {half:.{places}f}, p {p}, {marked(effect)}"


def marked(effect: Effect) -> str:
    """The verdict; ‡ where it survives the correction."""
    return effect.verdict + (" ‡" if effect.verdict in (SHOWN, CONTRARY) and effect.p_holm < LEVEL else "")


def verdict(result: Result) -> str:
    """Of the line."""
    return marked(result.effects[0])


def seeds(result: Result) -> str:
    """Those compared; how many there are where they are too few."""
    if result.verdict == NOT_RUN:
        return f"{len(result.seeds)} of {result.comparison.claim.seeds}"
    both = [*result.treatment.values(), *result.control.values()]
    dagger = "†" if any(row.provenance.get("git_dirty") for row in both) else ""
    return ", ".join(map(str, result.seeds)) + dagger


def cost(result: Result) -> str:
    """'BOPs +2.4 %'; equal where all costs are within 0.05 %, a dash where there is nothing to compare.

    So it is where the rows were billed by different conventions.
    """
    conventions = {row.cost.get("convention") for side in (result.treatment, result.control) for row in side.values()}
    if result.verdict == NOT_RUN or len(conventions) > 1:
        return "–"
    sides = (result.treatment.values(), result.control.values())
    known = [key for key in COST if all(row.cost.get(key) for side in sides for row in side)]
    totals = {key: [sum(row.cost[key] for row in side) for side in sides] for key in known}
    changes = {COST[key]: 100 * (one / other - 1) for key, (one, other) in totals.items()}
    told = ", ".join(f"{name} {change:+.1f} %" for name, change in changes.items() if abs(change) >= 0.05)
    return told or ("equal" if known else "–")


def summary(results: Sequence[Result]) -> list[list[str]]:
    """Verdicts by paper, as a table with its header."""
    counts: dict[str, Counter] = {}
    for result in results:
        counts.setdefault(result.comparison.claim.paper, Counter())[result.verdict] += 1
    names = titles()
    lines = [[names[paper], *(str(own[word]) for word in VERDICTS)] for paper, own in counts.items()]
    return [["paper", *VERDICTS], *lines]


def correction(results: Sequence[Result]) -> str:
    """How many tests there are, and what that means."""
    tests = [effect for result in results for effect in result.effects if effect.p is not None]
    held = sum(effect.p_holm < LEVEL for effect in tests)
    chance = LEVEL * len(tests)
    return (
        f"{len(tests)} tests. Their p values are not corrected: by chance alone about {chance:.0f} would be shown, and "
        f"as many contrary. ‡ marks the {held} that Holm's correction over all of them, two-sided, leaves below "
        f"{LEVEL}."
    )


def missing(results: Sequence[Result]) -> list[str]:
    """The commands that run what claims lack; finished cells of theirs are skipped."""
    lacking = {each.comparison.claim.id: each.comparison.claim for each in results if each.verdict == NOT_RUN}
    return list(dict.fromkeys(line for claim in lacking.values() for line in commands(claim)))


def commands(claim: Claim) -> list[str]:
    """The runs of both sides: one sweep where they set the same keys to other values, else two."""
    keys = [[text.partition("=")[0] for text in side] for side in (claim.treatment, claim.control)]
    sides = [claim.treatment, claim.control]
    if keys[0] == keys[1] and len(keys[0]) == 1:
        sides = [[f"{claim.treatment[0]},{claim.control[0].partition('=')[2]}"]]
    count = ",".join(map(str, range(claim.seeds)))
    return [shlex.join(["python", "-m", "dqbench", "-m", *claim.cell, *side, f"seed={count}"]) for side in sides]
