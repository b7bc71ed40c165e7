"""The methods that are compared, by what the trainer calls them; each has one learning rate, found in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trajectory_consistency.trainer.config.settings import MethodConfig

STEPS = (1, 2, 4, 8, 16, 32)
GAMMAS = (0.0, 0.3, 1.0)
SEEDS = (100, 1, 2)
TUNING_SEED = SEEDS[0]
"""Of the runs by which a learning rate is chosen, of which the best is then the first of those that are reported."""
TUNED_AT = (1, 2, 4, 8)
EMA_DECAY, HUBER_C = 0.95, 0.03
"""The same for all methods: of the average that gives the target, and of the distance to it."""


@dataclass(frozen=True)
class Method:
    """A way to distill."""

    name: str
    about: str
    gamma: float
    """Of its own sampler."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Of the trainer's section [method], beside what all have in common."""
    of: str = ""
    """The method that this is a variation of."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its section [method] of a configuration."""
        return {"ema_decay": EMA_DECAY, "huber_c": HUBER_C, "phases": [1], **self.changed}

    @property
    def config(self) -> MethodConfig:
        """The same, as the trainer has it."""
        return MethodConfig(**{**self.settings, "phases": tuple(self.settings["phases"])})


def cells(method: Method, most: int = STEPS[-1]) -> list[tuple[int, float]]:
    """The numbers of steps and gammas at which a method is measured, and of gammas not its own up to `most` steps.

    A single step has no noise to add, and so is the same at every gamma.
    """
    return [(steps, gamma) for steps in STEPS for gamma in GAMMAS if gamma == method.gamma or 1 < steps <= most]


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _by_name(
    Method("LCM", "s = 0", 1.0, {"law": "zero"}),
    Method("PCM", "s = the edge below t, of four phases", 0.0, {"law": "phase", "phases": [4]}),
    Method(
        "TSCD", "s uniform in the segment of t, of 8, 4, 2, 1 in turn", 0.3, {"law": "segment", "phases": [8, 4, 2, 1]}
    ),
    Method("TDD", "s = times of samplers of 4 to 8 steps, near below t", 0.3, {"law": "target"}),
    Method("TCD", "s uniform from 0 to t", 0.3, {"law": "uniform"}),
    Method("TCD S+", "the same, and the network is told s", 0.3, {"law": "uniform", "target_time": True}),
)


def _changed(of: str, name: str, **changed: Any) -> Method:
    method = METHODS[of]
    return replace(method, name=f"{of}, {name}", changed={**method.changed, **changed}, of=of)


PLAIN = _by_name(*(_changed(name, "plain", ema_decay=0.0) for name in ("LCM", "TCD", "TCD S+")))
"""The target is the student itself, with a learning rate found for that."""
VARIATIONS = _by_name(
    _changed("TCD", "weighting x0", weighting="x0"),
    _changed("TCD S+", "told t - s", target_input="t-s"),
    _changed("TCD S+", "weighting gap", weighting="gap"),
    _changed("TCD S+", "weighting x0", weighting="x0"),
    _changed("TCD S+", "Huber, c = 0.001", huber_c=0.001),
)
"""Other choices, at the learning rate of what they are variations of."""
