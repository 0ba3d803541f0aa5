"""python -m dqbench [overrides]: run one cell, or with -m a sweep; finished cells are skipped.

Under `accelerate launch` several processes run one cell (processes.py); the main one speaks and writes.
Exit status: 0 done, 1 a cell failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dqbench import processes
from dqbench.commands import exit_status
from dqbench.config import data_root, register
from dqbench.errors import UserError, one_line
from dqbench.identity import run_id
from dqbench.launching.cells import cells, is_finished, run_folder
from dqbench.launching.explain import explain
from dqbench.launching.lifeline import end_with_launcher
from dqbench.stages import taking_turns
from dqbench.sweep_tracking import log_sweep

log = logging.getLogger("dqbench")
failures: list[Exception] = []  # of the cells that ran in this process


def cell(cfg: DictConfig) -> None:
    """Run one cell unless its row is there. A failure is reported when it happens and kept: the sweep goes on."""
    name = run_id(cfg)
    try:
        with taking_turns(Path(cfg.paths.cache), f"run-{name}"):
            if processes.agreed(lambda: is_finished(cfg, anew=True)) and not cfg.runtime.force:
                log.info("%s is done already", name)
                return
            log.info("%s starts: %s", name, " ".join(HydraConfig.get().overrides.task) or "the default")
            _run(cfg, run_folder(cfg))
    except Exception as error:
        failures.append(error)
        if not processes.fails_first():
            return
        overrides = " ".join(HydraConfig.get().overrides.task)
        log.error("run %s failed: %s (%s)", name, reason(error), overrides or "the default", exc_info=True)


def _run(cfg: DictConfig, folder: Path) -> None:
    from dqbench.run import run
    from dqbench.tracking import track

    if not processes.is_main():
        run(cfg, folder)
        return
    (folder / "row.json").unlink(missing_ok=True)  # with runtime.force: no row is better than one of an earlier attempt
    with track(cfg, folder.name) as tracker:
        row = run(cfg, folder)
        tracker.log_row(row)
        if (image := folder / "samples.png").exists():
            tracker.log_image("samples", image)
        tracker.log_curves(row.diagnostics)


def reason(error: Exception) -> str:
    """What failed, on one line; for what is no mistake in the input with the error's kind."""
    if "No space left on device" in str(error):  # safetensors has an error of its own for it
        return "No space left on device; free some, and the same command goes on from what is finished"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; what is finished stays, the same command goes on from there"
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def report() -> int:
    """Print the finished cells as a table, and where they are. Returns how many are not finished."""
    from rich.console import Console

    from dqbench.comparison import with_baselines
    from dqbench.report import show
    from dqbench.results import finished
    from dqbench.results import rows as all_rows

    folders = list(dict.fromkeys(map(run_folder, cells)))
    rows = [row for row in map(finished, folders) if row is not None]
    if rows:
        console = Console()
        show(rows if len(folders) == 1 else with_baselines(rows, all_rows(Path(cells[0].paths.results))), console)
        for name, path in results_of(folders, len(rows)).items():
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    return len(folders) - len(rows)


def write_studies() -> None:
    """Let the study that a sweep names (table.study, a module of dqbench.studies) write its pages; tell where."""
    names = {str(cfg.table.study) for cfg in cells if cfg.table is not None and "study" in cfg.table}
    for name in sorted(names):
        pages = importlib.import_module(f"dqbench.studies.{name}").write(Path(cells[0].paths.results))
        print("\n".join(map(str, pages)))


def results_of(folders: list[Path], finished: int) -> dict[str, Path]:
    """What is told about where the results are: files of a single run, the place of all rows of a sweep."""
    if len(folders) > 1:
        return {f"{finished} of {len(folders)} rows": folders[0].parent / "*" / "row.json"}
    paths = [folders[0] / name for name in ("row.json", "samples.png", "samples.txt", "curves.png")]
    return {path.name: path for path in paths if path.exists()}


@hydra.main(config_path=str(data_root() / "conf"), config_name="config", version_base="1.3")
def hydra_main(cfg: DictConfig) -> None:
    """Hydra's task function. It never raises: Hydra would print the error a second time, in its own way."""
    cell(cfg)


def main() -> None:
    """The console script."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of Hydra's own printer
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script's `&` has SIGINT ignored
        signal.signal(number, signal.default_int_handler)  # whoever asks it to end gets what Ctrl-C gets
    end_with_launcher()
    logging.raiseExceptions = bool(os.environ.get("DQBENCH_DEBUG"))  # a log file on a full disk is no second problem
    processes.begin()
    register()
    failures.clear()
    cells.clear()
    try:
        _launch()
        missing = conclude()
    except KeyboardInterrupt:
        if processes.leads():  # all are interrupted at once
            processes.tell("interrupted; the same command goes on from there")
        sys.exit(130)
    if failures or missing:
        sys.exit(2 if len(cells) == 1 and failures and isinstance(failures[-1], UserError) else 1)


def conclude() -> int:
    """Tell what there is now, and log the sweep; one of several processes does. Returns how many cells have no row."""
    if not failures:
        processes.leave()
    if not processes.leads():
        return 0
    with exit_status():
        missing = report()
        write_studies()
        log_sweep(cells)
    return missing


def read_flags(argv: list[str]) -> None:
    """Raise UserError for a flag that does not exist; move -m to the front, since Hydra's parser wants it there."""
    multirun = [argument for argument in argv[1:] if argument in ("-m", "--multirun")]
    argv[1:] = multirun + [argument for argument in argv[1:] if argument not in multirun]
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{one_line(error)}; see --help") from error
    if unknown:
        raise UserError(f"{unknown[0]} is no flag; write overrides as key=value, after the flags; see --help")


def follow(argv: list[str]) -> None:
    """Have Hydra make no folders and no log in this process; its parser wants all overrides side by side."""
    own = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=follower"]
    places = [i for i, argument in enumerate(argv) if i and "=" in argument and not argument.startswith("-")]
    place = places[0] if places else len(argv)
    argv[place:place] = own


def _launch() -> None:
    """Let Hydra run the cells. Returns when all that could run have run; ends the program where none may."""
    try:
        with exit_status():
            read_flags(sys.argv)
            if not processes.leads():
                follow(sys.argv)
            hydra_main()
    except SystemExit as end:
        if end.code or not cells:  # not 0, or --help and the like; else all cells were finished before
            raise
    except (OSError, ValueError) as error:  # Hydra cannot read the command line, or cannot write to the results
        processes.tell(reason(error) if isinstance(error, OSError) else explain(error))
        sys.exit(1 if isinstance(error, OSError) else 2)


if __name__ == "__main__":
    main()
