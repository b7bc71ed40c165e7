"""What ends a command with a message in place of a traceback."""


class UserError(ValueError):
    """Bad input; the command line prints the message alone and exits with code 2."""


class RunError(RuntimeError):
    """A run that was rightly asked for and failed; the command line prints the message and exits with code 1."""
