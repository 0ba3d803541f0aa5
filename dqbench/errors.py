"""Errors that a user can mend."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, and what is allowed. The command line exits with status 2."""
