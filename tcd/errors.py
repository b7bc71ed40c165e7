"""Errors whose message tells the user what to do: the trainer's command line prints them without a traceback."""


class UserError(ValueError):
    """The input is invalid; the trainer's command exits with code 2."""


class RunError(RuntimeError):
    """The input was valid, but the run failed; the trainer's command exits with code 1."""
