"""Stop on Ctrl-C or SIGTERM at the end of a step, so that a checkpoint is never taken in the middle of one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Seconds within which two signals count as one Ctrl-C: the terminal sends one, and a launcher may send it again.
_SAME_CTRL_C = 1.0


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message says whether it can be resumed."""


@contextmanager
def watch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, hold back SIGINT and SIGTERM; yields a function that returns whether one has arrived.

    A second Ctrl-C, more than a second after the first signal, raises KeyboardInterrupt at once. Outside the main
    thread no handler can be installed, and the function always returns False.
    """
    first: float | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and number == signal.SIGINT and now - first > _SAME_CTRL_C:
            raise KeyboardInterrupt
        first = now if first is None else first

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
