"""The page of the comparison of methods, made from results that are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench" / "quality"))

import report
from methods import CELLS, FRESH_NOISE, METHODS, STEPS

BEST = {"LCM": 1.0, "TCD": 0.3}
"""Of the other methods it is 0."""
JUMPS = ("999 499", "499 0")


def cell(name: str, steps: int, gamma: float) -> dict[str, float]:
    """Distances that grow with the difference from the best gamma and, except for S+, with the steps."""
    grows = 0.0 if name == report.S_PLUS else 2e-4 * steps
    distance = 2e-3 + grows + (1e-2 * abs(gamma - BEST.get(name, 0.0)) if steps > 1 else 0.0)
    return {"distance": distance, "from_teacher": distance - 1.9e-3, "open_distance": distance}


def results(error: float = 0.5) -> report.Results:
    """Two seeds of every method; the errors of the jumps of S+ are `error` times those of the others."""
    others = ("covered", "strays", "right", "open_right", "open_from_teacher", "detail", "edges")
    rest = dict.fromkeys(others, 0.5)

    def run(name: str) -> dict[str, Any]:
        samples = {f"{steps} {gamma:g}": cell(name, steps, gamma) | rest for steps, gamma in CELLS}
        return {
            "samples": samples,
            "trajectory": dict.fromkeys(JUMPS, 0.1 * (error if name == report.S_PLUS else 1.0)),
        }

    def reference(fresh: float) -> dict[str, dict[str, float]]:
        teacher = dict.fromkeys(("distance", "from_teacher", "open_distance"), 3e-3) | rest
        solvers = ("DDIM", "DPM-Solver++(2M)", *(f"TCD, γ {gamma:g}" for gamma in FRESH_NOISE))
        found = {f"{solver} {steps}": teacher for solver in solvers for steps in (*STEPS, 50)}
        return {
            **found,
            "DDIM": dict.fromkeys(JUMPS, 0.3),
            "teacher": {"unevenness": 0.03},
            "fresh data": teacher | {"distance": fresh},
        }

    lr = dict.fromkeys(METHODS, 1e-3)
    tries = {name: {3e-4: 0.2, 1e-3: 0.1} for name in METHODS}
    return report.Results(
        tries, lr, {name: [run(name)] * 2 for name in METHODS}, [reference(0.0), reference(1e-4)], 1800
    )


@pytest.mark.parametrize(("name", "gamma"), [("LCM", 1.0), ("TCD", 0.3), ("PCM", 0.0)])
def test_the_best_gamma_has_the_smallest_distances(name: str, gamma: float) -> None:
    assert report.best_gamma(results(), name) == gamma


def test_each_goal_is_compared_with_its_limit() -> None:
    text = report.part("shapes", results())
    goals = [line for line in text.splitlines() if "(goal: " in line]
    assert len(goals) == 8
    assert sum("**met**" in line for line in goals) == 6
    for captions in ("complete", "partial"):
        assert f"{captions} captions, with 4 steps: 2.00 (goal: at most 1.96, 0.7 of LCM's): **not met**" in text
    worse = report.part("shapes", results(error=0.8))
    assert "relative to TCD S+, at most: 0.80 (goal: at most 0.70, for every t and s): **not met**" in worse


def test_the_page_has_every_method_in_every_table() -> None:
    text = report.part("shapes", results())
    for name in METHODS:
        gamma = BEST.get(name, 0.0)
        assert text.count(f"\n| {name}, γ {gamma:g} |") == 1 + len(report.ABOUT["shapes"].others)
    assert "| LCM, γ 1 | 2.2 (0.0) | 2.4 (0.0) | 2.8 (0.0) | 3.6 (0.0) | 5.2 (0.0) | 8.4 (0.0) |" in text
    assert "| teacher, DDIM, 50 steps |  |  |  |  |  | 3.0 (0.0) |" in text


def test_the_page_begins_with_the_main_methods_and_ends_with_the_hours() -> None:
    text = report.page({"checkerboard": results(), "shapes": results()})
    first, everything = text.split("# All results")
    assert "| TCD S+, diagonal, γ 0 | 2.0 (0.0) | 2.0 (0.0) |" in first
    assert first.count("\n| TCD S+, diagonal, γ 0 |") == 4 and "| PCM, γ" not in first
    assert "took 1.0 hours of one core" in everything
