"""The end of a sweep in W&B: a run of its own, beside those of its cells, that holds its table and the claims page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dqbench.comparison import in_order, label, spell
from dqbench.config import build
from dqbench.identity import digest, run_id
from dqbench.launching.cells import run_folder
from dqbench.metrics.text import ordered
from dqbench.results import Row, atomic_write, finished, rows
from dqbench.tracking import NoTracking, attempt, sweep_name

if TYPE_CHECKING:
    import wandb

COST = ("bops", "size_bytes", "bits_per_weight", "bits_per_act")


def log_sweep(cells: Sequence[DictConfig]) -> None:
    """Log the finished rows of a sweep once: again only where they have changed since, and into the same W&B run."""
    found = [row for row in map(finished, dict.fromkeys(map(run_folder, cells))) if row is not None]
    if len(cells) < 2 or not found or isinstance(tracking := build(cells[0].tracking), NoTracking):
        return
    name = tracking.group or sweep_name(cells[0]) or "sweep"
    sweep = f"sweep-{digest([name, sorted(map(run_id, cells))])}"
    results = Path(cells[0].paths.results)
    folder = results / ".sweep" / sweep
    state = digest([[row.run_id, row.provenance.get("time")] for row in found])
    if _logged(folder) == state:
        return
    config = {"sweep": name, "cells": sorted(map(run_id, cells))}
    run = tracking.open(id=sweep, name=name, group=name, job_type="sweep", dir=str(folder), config=config)
    if run is None:
        return
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve()))  # else uploads wait in the home folder
    taken = attempt("W&B did not take the sweep", partial(_send, run, name, found, results))
    attempt("W&B could not finish", partial(run.finish, exit_code=0 if taken else 1))
    if taken and not run.disabled:
        atomic_write(folder / "logged.json", json.dumps({"rows": state}) + "\n")


def _logged(folder: Path) -> str | None:
    """Of which rows the run has told already."""
    path = folder / "logged.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else None


def _send(run: wandb.Run, name: str, found: Sequence[Row], results: Path) -> bool:
    """Table and claims as one artifact, the claims also as a panel. True: nothing was refused."""
    import wandb

    from dqbench.claims.book import shipped
    from dqbench.claims.page import markdown
    from dqbench.claims.section import html
    from dqbench.claims.verdicts import judge

    claims = judge(shipped(results / "cache"), rows(results))
    columns, data = table(found)
    artifact = wandb.Artifact(f"sweep-{re.sub(r'[^-.0-9A-Z_a-z]', '-', name)}", type="sweep")
    artifact.add(wandb.Table(columns=columns, data=data), "table")
    with artifact.new_file("claims.md") as file:
        file.write(markdown(claims))
    run.log_artifact(artifact)
    run.log({"claims": wandb.Html(html(claims))})
    run.summary["rows"] = len(found)
    return True


def table(found: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """(columns, lines) of a sweep's rows in reading order; None where a row has no such metric or cost."""
    lines = in_order(found)
    names = ordered({name for row in found for name in (row.metrics | row.paired)})
    left = list(label(found[0]))
    data = [
        [
            *(label(row)[key] for key in left),
            *(spell(told), row.config["seed"]),
            *((row.metrics | row.paired).get(name, {}).get("value") for name in names),
            *(row.cost.get(key) for key in COST),
            row.run_id,
        ]
        for row, told in lines
    ]
    return [*left, "settings", "seed", *names, *COST, "run"], data
