"""Runs one case: a kind of file, mangled by a seed, read within limits of time and memory."""

import logging
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from kinds import KINDS

from trajectory_consistency.trainer.errors import RunError, UserError

SECONDS = 20
"""Longest time of one case; they take a tenth of a second."""
MEMORY = 2 * 2**30
"""Bytes of address space that all cases together may add."""


class TooLong(BaseException):
    """A case took longer than SECONDS; no handler of Exception takes it."""


class Outcome(NamedTuple):
    """How a case ended."""

    kind: str
    seed: int
    refused: bool
    fault: str
    """What is wrong, with a traceback; empty if nothing is."""


def run_case(kind: str, seed: int) -> Outcome:
    """Run one case in a folder of its own."""
    read, _ = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, _time_limit():
        refused, fault = False, ""
        try:
            read(Random(f"{kind} {seed}"), Path(name))
        except (UserError, RunError) as error:
            refused, fault = True, "" if str(error).strip() else "an error without a message"
        except OSError as error:  # the command line prints its message, if that names the file
            refused, fault = True, "" if error.filename else traceback.format_exc()
        except (Exception, TooLong):  # noqa: BLE001  (whatever it is, it is what is looked for)
            fault = traceback.format_exc()
        left = [str(path) for path in Path(name).rglob("*") if "unfinished" in path.name]
        return Outcome(kind, seed, refused, fault or (f"left behind: {left}" if left else ""))


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the process take MEMORY more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and what is logged."""
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
