"""Errors for which the command line prints a message instead of a traceback."""

from ..tcd.errors import RunError, UserError

__all__ = ["RunError", "UserError"]
