"""What a person sees of a run: one line per message on stderr. Tracebacks go to the run's own log file."""

from __future__ import annotations

import copy
import logging
import os
import sys


class Console(logging.Handler):
    """Writes to the sys.stderr of the moment, and so above a progress bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; a traceback only where DQBENCH_DEBUG asks for it."""
        print(self.format(record), file=sys.stderr, flush=True)

    def format(self, record: logging.LogRecord) -> str:
        """'12:34:56 text', or 'dqbench: text' for what went wrong."""
        shown = copy.copy(record)
        if not os.environ.get("DQBENCH_DEBUG"):
            shown.exc_info = shown.exc_text = shown.stack_info = None
        style = "%(asctime)s %(message)s" if record.levelno < logging.WARNING else "dqbench: %(message)s"
        return logging.Formatter(style, "%H:%M:%S").format(shown)
