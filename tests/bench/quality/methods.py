"""The methods that are compared, as settings of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trajectory_consistency.trainer.config.settings import MethodConfig
from trajectory_consistency.trainer.demo.distill import EMA_DECAY, HUBER_C

STEPS = (1, 2, 4, 8, 16, 32)
GAMMAS = (0.0, 0.3, 1.0)
FRESH_NOISE = GAMMAS[1:]
"""The gammas that add fresh noise; with 0 the TCD sampler is DDIM."""
SEEDS = (100, 1, 2)
TUNING_SEED = SEEDS[0]
"""Seed of the runs that choose the learning rate. The best of them is also the first of the reported runs."""
TUNED_AT = (1, 2, 4, 8)


@dataclass(frozen=True)
class Method:
    """A distillation method."""

    name: str
    about: str
    gamma: float
    """Gamma of the method's own sampler, with which its learning rate is chosen."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the trainer's section [method] that differ from the common ones."""
    of: str = ""
    """For a variation: the name of the method that it varies."""

    @property
    def settings(self) -> dict[str, Any]:
        """The section [method] of a configuration."""
        return {"ema_decay": EMA_DECAY, "huber_c": HUBER_C, "phases": [1], **self.changed}

    @property
    def config(self) -> MethodConfig:
        """The section [method] as the trainer's dataclass."""
        return MethodConfig(**{**self.settings, "phases": tuple(self.settings["phases"])})


CELLS = [(steps, gamma) for steps in STEPS for gamma in GAMMAS if steps > 1 or gamma == 0]
"""The (steps, gamma) at which every method is measured. One step adds no noise, so it is the same at every gamma."""


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _by_name(
    Method("LCM", "s = 0", 1.0, {"law": "zero"}),
    Method("PCM", "s = the start of t's phase, one of four", 0.0, {"law": "phase", "phases": [4]}),
    Method(
        "TSCD",
        "uniformly in t's segment, one of 8, then of 4, 2 and 1",
        0.3,
        {"law": "segment", "phases": [8, 4, 2, 1]},
    ),
    Method("TDD", "from the times of samplers of 4 to 8 steps, shortly below t", 0.3, {"law": "target"}),
    Method("TCD", "uniformly from 0 to t", 0.3, {"law": "uniform"}),
    Method(
        "TCD S+",
        "as TCD, and the network gets s; weighting x0",
        0.3,
        {"law": "uniform", "target_time": True, "weighting": "x0"},
    ),
    Method(
        "TCD S+, diagonal",
        "as TCD S+, but s = t_next in half of each batch and s = 0 in 15 %",
        0.0,
        {"law": "uniform", "target_time": True, "weighting": "x0", "diagonal": 0.5, "to_clean": 0.15},
    ),
)


def _changed(of: str, name: str, **changed: Any) -> Method:
    method = METHODS[of]
    return replace(method, name=f"{of}, {name}", changed={**method.changed, **changed}, of=of)


PLAIN = _by_name(_changed("TCD S+, diagonal", "plain", ema_decay=0.0))
"""The method whose target is computed by the student itself; in the first world it has a learning rate of its own."""
VARIATIONS = _by_name(
    _changed("TCD S+", "no weighting", weighting="none"),
    _changed("TCD S+, diagonal", "no weighting", weighting="none"),
    _changed("TCD S+, diagonal", "weighting gap", weighting="gap"),
    _changed("TCD S+, diagonal", "decay 0.99", ema_decay=0.99),
    _changed("TCD S+, diagonal", "Huber, c = 0.001", huber_c=0.001),
    _changed("TCD S+, diagonal", "input t - s", target_input="t-s"),
    _changed("TCD S+, diagonal", "without s", target_time=False),
)
"""Methods with one setting changed, and the learning rate of the method that they vary."""
