"""Errors for which the command line prints a message instead of a traceback."""


class UserError(ValueError):
    """The input is invalid; the command exits with code 2."""


class RunError(RuntimeError):
    """The input was valid, but the run failed; the command exits with code 1."""
