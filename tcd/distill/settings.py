"""What distillation needs from its callers: settings, a model, and conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..objective import DistanceName, Weighting
from ..schedule import Schedule, TimePoint
from ..times import Law


class Method(Protocol):
    """The distillation method. The trainer's configuration describes each setting, under the same name."""

    @property
    def law(self) -> Law: ...
    @property
    def phases(self) -> tuple[int, ...]: ...
    @property
    def diagonal(self) -> float: ...
    @property
    def to_clean(self) -> float: ...
    @property
    def order(self) -> int: ...
    @property
    def origin_steps(self) -> int: ...
    @property
    def skip(self) -> int: ...
    @property
    def guidance_min(self) -> float: ...
    @property
    def guidance_max(self) -> float: ...
    @property
    def distance(self) -> DistanceName: ...
    @property
    def huber_c(self) -> float: ...
    @property
    def weighting(self) -> Weighting: ...
    @property
    def ema_decay(self) -> float: ...


class Optimization(Protocol):
    """The length of a run and its optimizer. The trainer's configuration describes each setting."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def target_time_lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def seed(self) -> int: ...


C = TypeVar("C", bound="Conditioning")


class Conditioning(Protocol):
    """The network's inputs other than the noisy latent and the time, for B rows."""

    def __getitem__(self: C, rows: Tensor, /) -> C:
        """Return the rows with these indices, int64 [b]; the rows and the indices are on the CPU."""
        ...

    def map(self: C, change: Callable[[Tensor], Tensor], /) -> C:
        """Return the conditioning with a function applied to each tensor."""
        ...


class Distillable(Protocol):
    """A frozen network with its schedule and its adapter: the teacher with the adapter off, the student with it on."""

    adapter: Adapter

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule, with its tables on the network's device."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which the network computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        ...

    def x0(self, x_t: Tensor, t: TimePoint, cond: Any, s: TimePoint | None = None) -> Tensor:
        """Predict x0, float32 [B, C, ...], from x_t [B, C, ...] at t; s: target time, for an adapter that embeds it."""
        ...

    def guided_x0(
        self, x_t: Tensor, t: TimePoint, cond: Any, uncond: Any, guidance: Tensor, s: TimePoint | None = None
    ) -> Tensor:
        """Predict x0 as `x0` does, with guidance scales w [B]; w = 1 is no guidance."""
        ...
