"""Ctrl-C that waits for the end of a step, so that what is saved is always between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ECHO = 1.0  # seconds: a launcher passes on the very Ctrl-C that the terminal sent already


class Interrupted(KeyboardInterrupt):
    """The run was stopped by the person, and can go on; the message says how."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was pressed, or the process asked to end, since the block began.

    A second Ctrl-C, a second later or more, interrupts at once. Outside the main thread, where signals do not arrive,
    it is never so.
    """
    first: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and number == signal.SIGINT and now - first > _ECHO:
            raise KeyboardInterrupt
        first = now if first is None else first

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
