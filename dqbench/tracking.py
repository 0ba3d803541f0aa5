"""W&B as a mirror of a run: config, row, sample grid, curves. row.json is the truth, so nothing here may fail a run."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dqbench.config import build
from dqbench.errors import UserError
from dqbench.launching.cells import cells

if TYPE_CHECKING:
    import wandb

    from dqbench.results import Row

MODES = ("auto", "online", "offline", "disabled")
MIRRORED = ("metrics", "reference", "paired", "cost", "timing", "provenance")  # parts of a row
log = logging.getLogger(__name__)


@dataclass
class NoTracking:
    """Nothing is tracked, W&B is not imported."""

    def start(self, cfg: DictConfig, run_id: str) -> None:
        return None

    def open(self, **given: Any) -> None:
        return None


@dataclass
class Wandb:
    """Where runs go. mode auto: online with a key, else offline (`wandb sync` uploads later). WANDB_MODE wins."""

    project: str
    entity: str | None
    group: str | None  # None: the sweep's name
    mode: str  # auto | online | offline | disabled
    dir: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"tracking.mode={self.mode} is unknown; allowed: {', '.join(MODES)}")

    def start(self, cfg: DictConfig, run_id: str) -> wandb.Run | None:
        """The W&B run of a cell, new or continued."""
        config = OmegaConf.to_container(cfg, resolve=True)
        return self.open(id=run_id, group=self.group or sweep_name(cfg), dir=self.dir, config=config)

    def open(self, **given: Any) -> wandb.Run | None:
        """A W&B run, continued where its id is known; offline where the server fails, None if that fails too.

        given: what wandb.init takes beside project, entity and mode.
        """
        mode = choose_mode(self.mode)
        run = self._init(mode, given)
        return run if run or mode in ("offline", "disabled") else self._init("offline", given)

    def _init(self, mode: str, given: Mapping[str, Any]) -> wandb.Run | None:
        def start() -> wandb.Run:
            import wandb

            Path(given["dir"]).mkdir(parents=True, exist_ok=True)
            settings = wandb.Settings(silent=True, console="off", init_timeout=30)
            where = {"project": self.project, "entity": self.entity, "mode": mode}
            return wandb.init(**where, **given, resume="allow", settings=settings)

        return attempt(f"W&B could not start ({mode})", start)


@dataclass(frozen=True)
class Tracker:
    """What a run tells W&B. Without a W&B run, every call does nothing."""

    run: wandb.Run | None

    def log_row(self, row: Row) -> None:
        """The row's numbers as the run's summary: metrics/fd_digits, metrics/fd_digits/low, cost/bops, ..."""

        def send(run: wandb.Run) -> None:
            run.summary.update(flat({part: getattr(row, part) for part in MIRRORED} | {"status": row.status}))

        self._send("the row", send)

    def log_image(self, name: str, path: Path) -> None:
        """A picture, such as the sample grid."""

        def send(run: wandb.Run) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._send(name, send)

    def log_curves(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Each group of a row's diagnostics as a line chart under its name."""
        for name, group in groups.items():
            self._send(name, partial(_send_chart, name, group))

    def _send(self, what: str, send: Callable[[wandb.Run], None]) -> None:
        if self.run is not None:
            attempt(f"W&B did not take {what}", partial(send, self.run))


def _send_chart(name: str, group: Mapping[str, Any], run: wandb.Run) -> None:
    import wandb

    lines = group["lines"].values()
    points = [[pair for pair in zip(group["x"], line, strict=True) if pair[1] is not None] for line in lines]
    xs, ys = ([[pair[axis] for pair in line] for line in points] for axis in (0, 1))
    run.log({name: wandb.plot.line_series(xs, ys, keys=list(group["lines"]), title=name, xname=group["x_label"])})


@contextmanager
def track(cfg: DictConfig, run_id: str) -> Iterator[Tracker]:
    """Track one run: `with track(cfg, run_id) as tracker`. cfg: the whole config. An error inside marks it failed."""
    run = build(cfg.tracking).start(cfg, run_id)
    exit_code = 1
    try:
        yield Tracker(run)
        exit_code = 0
    finally:
        if run is not None:
            attempt("W&B could not finish", partial(run.finish, exit_code=exit_code))


def attempt(problem: str, action: Callable[[], Any]) -> Any:
    """The result of action(), or None with a warning: whatever W&B raises, the run goes on."""
    try:
        return action()
    except Exception as error:
        log.warning("%s: %s: %s; the row is not affected", problem, type(error).__name__, " ".join(str(error).split()))
        return None


def choose_mode(mode: str) -> str:
    """WANDB_MODE if set; else the given mode, where auto means online with a key and offline without."""
    chosen = os.environ.get("WANDB_MODE") or mode
    return ("online" if has_key() else "offline") if chosen == "auto" else chosen


def has_key() -> bool:
    """Whether W&B would find credentials: environment, or a netrc entry for its host. Asks no network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    path = next((path for name in files if name and (path := Path(name).expanduser()).is_file()), None)
    try:
        return path is not None and netrc.netrc(path).authenticators(host or "") is not None
    except (netrc.NetrcParseError, OSError):
        return False


def sweep_name(cfg: DictConfig) -> str | None:
    """The preset of `+sweeps=NAME`, the names of the models in a sweep without one, None for a single run."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if preset := hydra.runtime.choices.get("sweeps"):
        return preset
    names = sorted({cell.model.name for cell in cells} or {cfg.model.name})
    return "+".join(names) if hydra.mode == RunMode.MULTIRUN else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by '/'; a metric's value stands under the metric's own name."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "value" and prefix else f"{prefix}/{key}".lstrip("/")
        result |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return result
