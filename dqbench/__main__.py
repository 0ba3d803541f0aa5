"""python -m dqbench [overrides]: run one cell, or with -m a sweep; finished cells are skipped.

Exit status: 0 done, 1 a cell failed, 2 bad input.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dqbench.config import check, data_root, exit_status, one_line, register, run_id
from dqbench.errors import UserError
from dqbench.launching.cells import sweep

log = logging.getLogger("dqbench")
failed: list[str] = []


def cell(cfg: DictConfig) -> None:
    """Run one cell unless its row is there; in a sweep a failure is reported when it happens and the sweep goes on."""
    from dqbench.results import Row, finished

    check(cfg)
    folder = Path(cfg.paths.results) / "runs" / run_id(cfg)
    if finished(folder) is not None and not cfg.runtime.force:
        log.info("%s is done: %s", folder.name, folder / "row.json")
        return
    try:
        _run(cfg, folder)
    except UserError:
        raise
    except Exception as error:
        failed.append(folder.name)
        log.error("%s failed: %s: %s", folder.name, type(error).__name__, one_line(error))
        log.debug("traceback", exc_info=True)
        raise
    assert Row.read(folder).status == "done"


def _run(cfg: DictConfig, folder: Path) -> None:
    from dqbench.run import run
    from dqbench.tracking import track

    with track(cfg, folder.name) as tracker:
        row = run(cfg, folder)
        tracker.log_row(row)
        tracker.log_image("samples", folder / "samples.png")
        if row.diagnostics:
            tracker.log_curve("noise error", row.diagnostics["timestep"], row.diagnostics["noise_error"])


def report(folders: list[Path]) -> None:
    """Print the finished rows of `folders` as a table, and where they are."""
    from rich.console import Console

    from dqbench.report import show
    from dqbench.results import finished

    rows = [row for row in map(finished, folders) if row is not None]
    if not rows:
        return
    console = Console()
    show(rows, console)
    if len(folders) == 1:
        console.print(f"row:     {folders[0] / 'row.json'}\nsamples: {folders[0] / 'samples.png'}", highlight=False)
    else:
        console.print(f"{len(rows)} of {len(folders)} cells done; rows: {folders[0].parent}/*/row.json", highlight=False)


@hydra.main(config_path=str(data_root() / "conf"), config_name="config", version_base="1.3")
def hydra_main(cfg: DictConfig) -> None:
    """Hydra's task function."""
    cell(cfg)
    if HydraConfig.get().mode == hydra.types.RunMode.RUN:
        report([Path(cfg.paths.results) / "runs" / run_id(cfg)])


def main() -> None:
    """The console script."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's own printer
    register()
    try:
        with exit_status():
            hydra_main()
    except Exception as error:
        if os.environ.get("DQBENCH_DEBUG"):
            raise
        if not failed:
            print(f"dqbench: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        if sweep:
            report([Path(item.paths.results) / "runs" / run_id(item) for item in sweep])


if __name__ == "__main__":
    main()
