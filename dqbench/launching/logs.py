"""What a person sees of a run: one line per message on stderr. Tracebacks go to the run's own log file."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterable

WRONG = "dqbench: "  # begins a line of what ended a run
WARNING = f"{WRONG}warning: "


def last_words(lines: Iterable[str]) -> list[str]:
    """What a run's output says went wrong, in order; warnings are not."""
    return [line.removeprefix(WRONG) for line in lines if line.startswith(WRONG) and not line.startswith(WARNING)]


class Console(logging.Handler):
    """Writes to the sys.stderr of the moment, and so above a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; a traceback only where DQBENCH_DEBUG asks for it."""
        print(self.format(record), file=sys.stderr, flush=True)

    def format(self, record: logging.LogRecord) -> str:
        """'12:34:56 text', 'dqbench: warning: text', or 'dqbench: text' for what went wrong."""
        shown = copy.copy(record)
        if not os.environ.get("DQBENCH_DEBUG"):
            shown.exc_info = shown.exc_text = shown.stack_info = None
        wrong = f"{WARNING}%(message)s" if record.levelno < logging.ERROR else f"{WRONG}%(message)s"
        style = "%(asctime)s %(message)s" if record.levelno < logging.WARNING else wrong
        return logging.Formatter(style, "%H:%M:%S").format(shown)
