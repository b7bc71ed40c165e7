"""The settings of the node TCDDistill: what the user gives, and a preset for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..tcd import TargetInput
from ..tcd.objective import DistanceName, Weighting
from ..tcd.times import Law
from .ranges import check_range

FAST, GOOD, BEST = "fast try", "good", "best"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    FAST: {"steps": 200, "batch": 4, "accumulate": 2, "rank": 16, "lr": 2e-4},
    GOOD: {"steps": 2000, "batch": 8, "accumulate": 4, "rank": 64, "lr": 1e-4},
    BEST: {"steps": 4000, "batch": 16, "accumulate": 8, "rank": 64, "lr": 1e-4},
}
"""By the name of the preset: the values of the inputs that are left at 0."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """The settings of a run, under the names of the trainer's configuration, which describes them.

    The defaults are those of the trainer's recipes; docs/quality.md says what each changes.
    """

    steps: int
    batch: int
    accumulate: int
    """Number of parts into which the pictures of a step are divided, to need less memory."""
    rank: int
    lr: float
    seed: int = 0
    guidance_min: float = 2.0
    guidance_max: float = 8.0
    target_time: bool = True
    """Whether the network gets the target time (TCF(S+))."""
    caption_dropout: float = 0.1
    ema_decay: float = 0.95
    target_time_lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    law: Law = "uniform"
    phases: tuple[int, ...] = (1,)
    order: int = 1
    origin_steps: int = 50
    skip: int = 20
    distance: DistanceName = "huber"
    huber_c: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of range, or a batch that cannot be divided into equal parts."""
        for name in ("steps", "batch", "accumulate", "rank"):
            check_range(name, getattr(self, name), 1, 100000)
        check_range("learning_rate", self.lr, 0.0, 1.0)
        check_range("guidance_min", self.guidance_min, 0.0, 100.0)
        check_range("guidance_max", self.guidance_max, self.guidance_min, 100.0)
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch is {self.batch} and accumulate is {self.accumulate}: use a batch that is a multiple of "
                "accumulate, because accumulate is the number of equal parts into which a batch is divided"
            )

    @staticmethod
    def from_preset(preset: str, **given: Any) -> DistillSettings:
        """Return the settings of a preset, with the given values that are not 0 in place of the preset's."""
        own = {name: value for name, value in given.items() if name not in PRESETS[preset] or value != 0}
        return DistillSettings(**{**PRESETS[preset], **own})

    @property
    def alpha(self) -> float:
        """The LoRA's alpha: the update is not scaled."""
        return float(self.rank)

    @property
    def target_input(self) -> TargetInput | None:
        """The quantity that is embedded for the target time, or None without an embedding."""
        return "s" if self.target_time else None

    @property
    def weighting(self) -> Weighting:
        """Weight of a picture's distance: with the target time, short and long jumps count the same."""
        return "x0" if self.target_time else "none"

    @property
    def diagonal(self) -> float:
        """Share of each batch with s = t_next; it needs the target time."""
        return 0.5 if self.target_time else 0.0

    @property
    def to_clean(self) -> float:
        """Share of each batch with s = 0; it needs the target time."""
        return 0.15 if self.target_time else 0.0

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which the learning rate rises to its peak."""
        return min(100, self.steps // 10)

    @property
    def eta(self) -> float:
        """The eta to sample with."""
        return 0.0 if self.target_time else 0.3

    @property
    def micro_batches(self) -> list[slice]:
        """The rows of each part of a batch."""
        size = self.batch // self.accumulate
        return [slice(start, start + size) for start in range(0, self.batch, size)]
