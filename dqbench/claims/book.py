"""Claims as they are written down: published/claims.yaml, checked, and composed to the cells that each compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dqbench.comparison import leaves
from dqbench.config import compose, data_root, expand, register
from dqbench.errors import UserError
from dqbench.identity import digest, identity
from dqbench.launching.checks import check
from dqbench.launching.explain import explain
from dqbench.rendering.cells import configs_state
from dqbench.results import atomic_write

BOOK = Path(__file__).resolve().parents[1] / "published" / "claims.yaml"
LABELS = ("method.name",)  # names a cell and changes nothing
Identity = dict[str, Any]


@dataclass
class Claim:
    """That cells with the treatment's overrides do better than with the control's; all lists are Hydra overrides."""

    id: str
    paper: str
    source: str  # where the paper says so
    statement: str
    cell: list[str]  # of both sides; one that names several values, bits=w4a4,w4a8, makes a comparison of each
    treatment: list[str]
    control: list[str]
    about: list[str]  # fnmatch patterns of the config's keys in which the two may differ
    metrics: list[str]  # the first is nearest to what the paper reports, and decides
    seeds: int  # fewer common seeds are no test


@dataclass
class Book:
    """The file: titles of papers, the number of seeds that claims need by default, claims."""

    papers: dict[str, str]
    seeds: int
    claims: list[Any]


@dataclass(frozen=True)
class Comparison:
    """A claim at one of its cases. treatment, control: series() of their cells."""

    claim: Claim
    cell: list[str]  # the claim's, at one value each
    case: str  # 'w4a8', with what else tells it from the claim's other cases
    treatment: str
    control: str


def read(path: Path = BOOK) -> tuple[dict[str, str], list[Claim]]:
    """(titles by paper, claims in the order of the file); UserError for unknown keys, wrong types, ids used twice."""
    try:
        book = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Book), OmegaConf.load(path)))
        claims = [to_claim(node, book.seeds) for node in book.claims]
    except OmegaConfBaseException as error:
        raise UserError(f"{path.name}: {explain(error)}") from error
    ids = [claim.id for claim in claims]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise UserError(f"claim {twice} is there twice; ids are unique")
    if lost := next((claim for claim in claims if claim.paper not in book.papers), None):
        raise UserError(f"claim {lost.id}: paper={lost.paper} is unknown; allowed: {', '.join(book.papers)}")
    return book.papers, claims


def to_claim(node: Any, seeds: int) -> Claim:
    """One entry of the file, checked."""
    name = node.get("id", "?") if isinstance(node, dict) else "?"
    try:
        claim = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Claim), {"seeds": seeds, **node}))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"claim {name}: {explain(error)}") from error
    if claim.seeds < 2:
        raise UserError(f"claim {name}: seeds={claim.seeds} is out of range; allowed: 2 or more")
    if not claim.metrics:
        raise UserError(f"claim {name}: metrics is empty; allowed: one or more, the first of which decides")
    if given := next((text for text in [*claim.cell, *claim.treatment, *claim.control] if text.startswith("seed=")), 0):
        raise UserError(f"claim {name}: {given} has no meaning, all common seeds are compared; leave it out")
    return claim


def titles() -> dict[str, str]:
    """What the shipped book calls each paper."""
    return read()[0]


def shipped(folder: Path | None = None) -> list[Comparison]:
    """The comparisons of the shipped book. Composing takes seconds: what comes of it is kept in `folder`."""
    state = configs_state(BOOK, Path(__file__))
    if folder is None:
        return _composed(state)
    path, claims = folder / "claims.json", read()[1]
    known = _kept(path)
    if known.get("state") != state:
        found = [{**vars(each), "claim": each.claim.id} for each in _composed(state)]
        known = {"state": state, "comparisons": found}
        atomic_write(path, json.dumps(known) + "\n")
    by_id = {claim.id: claim for claim in claims}
    return [Comparison(**{**each, "claim": by_id[each["claim"]]}) for each in known["comparisons"]]


@cache
def _composed(state: str) -> list[Comparison]:
    """Those of the book and the configs as they are; once in a process while they stay so."""
    return comparisons(read()[1])


def _kept(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is not there, or damaged: it is made again."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}


def comparisons(claims: Sequence[Claim]) -> list[Comparison]:
    """Every claim at every case of its cell; a cell that several claims name is composed once."""
    register()
    cells = cache(_identity)
    with hydra.initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        return [found for claim in claims for found in _cases(claim, cells)]


def _cases(claim: Claim, cells: Callable[[tuple[str, ...]], Identity]) -> Iterator[Comparison]:
    try:
        for common in expand(claim.cell):
            treatment, control = (cells((*common, *side)) for side in (claim.treatment, claim.control))
            check_about(claim, treatment, control)
            told = [text for text in common if text not in claim.cell and not text.startswith("bits=")]
            bits = "w{weight}a{act}".format(**treatment["bits"])
            yield Comparison(claim, list(common), " ".join([bits, *told]), series(treatment), series(control))
    except (ValueError, HydraException, OmegaConfBaseException) as error:  # Hydra raises ValueErrors of its own
        line = explain(error)
        raise UserError(line if line.startswith("claim ") else f"claim {claim.id}: {line}") from error


def _identity(overrides: tuple[str, ...]) -> Identity:
    cfg = compose(list(overrides))
    check(cfg)
    return identity(cfg)


def series(content: Identity) -> str:
    """What cells have in common that differ by seed alone, for a cell's identity() or a row's config."""
    return digest({key: value for key, value in content.items() if key != "seed"})


def check_about(claim: Claim, treatment: Identity, control: Identity) -> None:
    """Raise UserError where the two do not differ, or differ in more than the claim is about."""
    one, other = leaves(treatment), leaves(control)
    differing = [key for key in dict.fromkeys([*one, *other]) if one.get(key, ...) != other.get(key, ...)]
    if not set(differing) - set(LABELS):
        raise UserError(f"claim {claim.id}: treatment and control are the same cell; they must differ in {claim.about}")
    more = [key for key in differing if not any(fnmatch(key, pattern) for pattern in (*LABELS, *claim.about))]
    if more:
        allowed = ", ".join(claim.about)
        raise UserError(f"claim {claim.id}: treatment and control differ in {', '.join(more)}, too; allowed: {allowed}")
