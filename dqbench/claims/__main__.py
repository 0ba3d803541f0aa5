"""Claims judged on the rows there are: verdicts by paper, and the commands that fill what is not run.

python -m dqbench.claims [results=DIR] [json=PATH]

It writes the claims page, as `python -m dqbench.tables` does. Only commands go to standard output: pipe them to sh.
"""

from __future__ import annotations

import sys

from dqbench.claims.page import paths, records, write
from dqbench.claims.section import told
from dqbench.claims.sheets import missing
from dqbench.commands import command
from dqbench.studies.page import arguments, save_json


@command
def main(argv: list[str]) -> None:
    """Write, tell, list."""
    folder, path = arguments(argv)
    results = write(folder)
    print(*paths(folder), told(results), sep="\n", file=sys.stderr)
    for line in missing(results):
        print(line)
    save_json(path, records(results))


if __name__ == "__main__":
    main()
