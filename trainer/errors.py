"""The one error that means: the user's input is at fault, and the message says what to do about it."""


class UserError(ValueError):
    """Bad input; the command line prints the message alone and exits with code 2."""
