"""The methods that are compared, by what the trainer calls them; each has one learning rate, found in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = (1, 2, 4, 8, 16, 32)
GAMMAS = (0.0, 0.3, 1.0)
SEEDS = (0, 1, 2)
TUNING_SEED = 100
"""Of the runs by which a learning rate is chosen, which are not among those that are reported."""
TUNED_AT = (1, 2, 4, 8)
EMA_DECAY, HUBER_C = 0.95, 0.03
"""The same for all: of the average that gives the target, and of the distance to it."""


@dataclass(frozen=True)
class Method:
    """A way to distill."""

    name: str
    law: str
    about: str
    gamma: float
    """Of its own sampler."""
    phases: tuple[int, ...] = (1,)
    target_time: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Its part of the section [method] of a configuration."""
        return {"law": self.law, "phases": list(self.phases), "target_time": self.target_time}


METHODS = {
    method.name: method
    for method in (
        Method("LCM", "zero", "s = 0", 1.0),
        Method("PCM", "phase", "the edge below t, of four phases", 0.0, phases=(4,)),
        Method("TSCD", "segment", "uniform in the segment of t, of 8, 4, 2, 1 in turn", 0.3, phases=(8, 4, 2, 1)),
        Method("TDD", "target", "times of 4 to 8 steps, near below t", 0.3),
        Method("TCD", "uniform", "uniform from 0 to t", 0.3),
        Method("TCD S+", "uniform", "the same, and the network is told s", 0.3, target_time=True),
    )
}
