"""A short part of `make kills`."""

import random
from pathlib import Path

from kills import PHASES, kill_runs


def test_killed_runs_end_as_one_that_was_not(tmp_path: Path) -> None:
    assert all(callable(getattr(owner, name)) for owner, name in PHASES.values())
    assert kill_runs(tmp_path, kills=2, rng=random.Random(1)).total() == 2
