"""The methods that are compared, by what the trainer calls them; each has one learning rate, found in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = (1, 2, 4, 8, 16, 32)
GAMMAS = (0.0, 0.3, 1.0)
SEEDS = (0, 1, 2)
TUNING_SEED = 100
"""Of the runs by which a learning rate is chosen, which are not among those that are reported."""


@dataclass(frozen=True)
class Method:
    """A way to distill."""

    name: str
    law: str
    gamma: float
    """Of its own sampler."""
    phases: tuple[int, ...] = (1,)
    target_time: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Its part of the section [method] of a configuration."""
        told = {"target_time": True} if self.target_time else {}
        return {"law": self.law, "phases": list(self.phases), **told}


METHODS = (
    Method("LCM", "zero", 1.0),
    Method("PCM", "phase", 0.0, phases=(4,)),
    Method("TSCD", "segment", 0.3, phases=(8, 4, 2, 1)),
    Method("TDD", "target", 0.3),
    Method("TCD", "uniform", 0.3),
    Method("TCD S+", "uniform", 0.3, target_time=True),
)
