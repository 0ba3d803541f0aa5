"""The small commands: how they read their arguments, and end where these are wrong."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from dqbench.errors import UserError
from dqbench.processes import tell


def split_json(argv: list[str]) -> tuple[list[str], Path | None]:
    """Split `json=PATH` off a reporting command's arguments."""
    targets = [Path(arg.removeprefix("json=")) for arg in argv if arg.startswith("json=")]
    return [arg for arg in argv if not arg.startswith("json=")], targets[-1] if targets else None


@contextmanager
def exit_status() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit status 2. DQBENCH_DEBUG=1 keeps the traceback."""
    from hydra.errors import HydraException
    from yaml import YAMLError

    from dqbench.launching.explain import explain

    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        if os.environ.get("DQBENCH_DEBUG"):
            raise
        tell(explain(error))
        sys.exit(2)


def command(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Make a reporting command of `main(argv)`: bad input is one line and status 2; --help prints its module's text."""

    @functools.wraps(main)
    def wrapped() -> None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print((sys.modules[main.__module__].__doc__ or "").strip())
            return
        with exit_status():
            main(sys.argv[1:])

    return wrapped
