"""Wait for the other processes of a run for as long as they live, and notice when one of them has ended.

The timeout of a collective cannot tell a process that has died from one that still encodes pictures or draws previews.
So each process counts a beat in the store at which they met, and one that waits looks whether the others' beats go on.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch import distributed

from ..errors import RunError

BEAT_SECONDS, DEAD_SECONDS = 5.0, 120.0
"""Time between two beats, and the time without one after which a process counts as dead."""


class Peers:
    """The other processes of a run, which meet at the address in MASTER_ADDR and MASTER_PORT."""

    def __init__(self, rank: int, count: int) -> None:
        """Begin to count beats; every process must do this at the same time."""
        self._rank, self._count, self._meetings = rank, count, 0
        self._store = _connect()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(_connect(),), daemon=True).start()

    def meet(self) -> None:
        """Wait until every process has called this as often as this one.

        Raises RunError if one has ended, within DEAD_SECONDS and the time of two beats.
        """
        self._meetings += 1
        try:
            if self._store.add(f"meeting/{self._meetings}", 1) == self._count:
                self._store.delete_key(f"meeting/{self._meetings - 1}")  # nobody waits there any more
            self._wait_for(f"meeting/{self._meetings}")
        except distributed.DistError as error:
            raise RunError("the main process of the run has ended: see what it says") from error

    def leave(self) -> None:
        """Meet for the last time. The main process returns after the others, because the store ends with it."""
        self.meet()
        self._ended.set()
        with suppress(distributed.DistError):  # the main process may end before it has answered
            self._store.add("left", 1)
            if self._rank == 0:
                self._wait_for("left")

    def _wait_for(self, key: str) -> None:
        """Wait until as many processes as there are have added 1 to `key`."""
        began, heard = time.monotonic(), dict[int, tuple[int, float]]()
        while self._store.add(key, 0) < self._count:
            now = time.monotonic()
            if now - began > BEAT_SECONDS:
                self._check_beats(heard, now)
            time.sleep(min(0.1 * (now - began) + 1e-4, BEAT_SECONDS))

    def _check_beats(self, heard: dict[int, tuple[int, float]], now: float) -> None:
        """Raise RunError if a process has not counted on for DEAD_SECONDS; heard: its count, and when it was new."""
        for rank in range(self._count):
            beats = self._store.add(f"beats/{rank}", 0)
            before, since = heard.setdefault(rank, (beats, now))
            if beats != before:
                heard[rank] = (beats, now)
            elif now - since > DEAD_SECONDS:
                raise RunError(f"process {rank} of {self._count} has ended or hangs: see what it says; start again")

    def _beat(self, store: Any) -> None:
        with suppress(distributed.DistError):  # the main process has ended, and the store with it
            while not self._ended.wait(BEAT_SECONDS):
                store.add(f"beats/{self._rank}", 1)


def _connect() -> Any:
    """Connect to the store of the process group; each thread needs a connection of its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
        host, port, is_master=False, timeout=timedelta(seconds=DEAD_SECONDS)
    )
    # torchrun keeps the store when it starts the processes again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"tcd/{attempt}", store)  # type: ignore[attr-defined]
