"""Errors that a user can mend."""

from __future__ import annotations

from collections.abc import Collection


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, and what is allowed. The command line exits with status 2."""


def check_choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise UserError unless `value` is one of the words allowed for `key`."""
    if value not in allowed:
        raise UserError(f"{key}={value} is unknown; allowed: {', '.join(allowed)}")


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
