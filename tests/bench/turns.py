"""Loops in processes of their own that take turns, a step at a time, so that both meet the same machine.

Nothing of the project is imported here: a process chooses its own version of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Loop:
    """A process that answers when it is asked: the other side of `serve`."""

    def __init__(self, *command: object, python: Path = Path(sys.executable)) -> None:
        """Start an interpreter, by default this one, with a script and its arguments, and wait until it is ready."""
        # Threads that wait for work by spinning would slow the other loop down, and one another where cores are few.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [str(python), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def ask(self, what: str) -> float:
        assert self._process.stdin
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended: see its error above")
        return json.loads(line)


def serve(**answers: Callable[[], float]) -> None:
    """Answer each line of the standard input that names one of `answers`, until it ends."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def in_turns(loops: Mapping[str, Loop], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each loop, of which each is the first as often; one more goes before, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(steps + 1):
        for name in list(loops)[:: -1 if turn % 2 else 1]:
            seconds = loops[name].ask("step")
            print(f"{name}: {seconds:.3f} s", flush=True)
            if turn:
                times[name].append(seconds)
    return times
