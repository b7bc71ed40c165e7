"""A short version of `python tests/fuzz`, and that it finds what is wrong."""

import time
from pathlib import Path
from random import Random

import cases
import kinds
import pytest

from trajectory_consistency.trainer.errors import UserError

OTHERS = ["a checkpoint", "a diffusers folder", "a cache"]  # a tenth of a second each, or more
COUNTS = {kind: 2 if kind in OTHERS else 20 for kind in kinds.KINDS}


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_mangled_file_is_read_or_refused_with_a_message(kind: str) -> None:
    with cases.limited_memory(), cases.quiet():
        outcomes = [cases.run_case(kind, seed) for seed in range(COUNTS[kind])]
    assert not [(each.seed, each.fault) for each in outcomes if each.fault]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda: {}["a"], "KeyError"),
        (lambda: bytearray(2**40), "MemoryError"),
        (lambda: time.sleep(9), "TooLong"),
        (lambda: (_ for _ in ()).throw(UserError("")), "an error without a message"),
    ],
)
def test_a_fault_is_found(fault: object, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "a fault", (lambda rng, folder: list(fault()), 1))
    monkeypatch.setattr(cases, "SECONDS", 0.1)
    with cases.limited_memory():
        assert found in cases.run_case("a fault", 0).fault


def test_a_file_that_is_left_half_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(rng: Random, folder: Path) -> None:
        (folder / ".x.unfinished.safetensors").write_bytes(b"half")

    monkeypatch.setitem(kinds.KINDS, "a fault", (leave, 1))
    assert "left behind" in cases.run_case("a fault", 0).fault
