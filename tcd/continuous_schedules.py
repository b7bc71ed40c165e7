"""Schedules that are even in flow time, without a table of timesteps: rectified flow, and EDM and the like.

Their training times are thousandths, the whole numbers 0 .. 1000; 0 is clean. FlowSchedule counts the model's own time
u before its shift, ContinuousSchedule flow time sigma / (1 + sigma) as a part of its maximum. Grids are even in them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from .levels import HalfLogSNR, to_zero, with_ndim
from .schedule import TimePoint
from .timesteps import FLOW_TIMESTEPS, check_steps, even_grid, parse_flow_times
from .trajectory import Level

_Even = TypeVar("_Even", bound="_EvenSchedule")


class _EvenSchedule(ABC):
    """What the two have in common: training times, and all that follows from the sigma of one."""

    @property
    def num_times(self) -> int:
        """1001."""
        return FLOW_TIMESTEPS + 1

    def grid(self, origin_steps: int) -> Tensor:
        """Return 0, 1000 / origin_steps ... 1000, int64 [origin_steps + 1], each to the nearest whole number.

        Raises ValueError unless origin_steps is from 1 to 1000.
        """
        return torch.tensor(even_grid(origin_steps))

    def visited(self, steps: int, origin_steps: int) -> list[int]:
        """Return the times of sigmas_for(steps) above 0, descending, in whole thousandths, whatever origin_steps is.

        Raises ValueError unless steps is from 1 to 1000.
        """
        return even_grid(steps)[:0:-1]

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of training times [B], thousandths and fractions of them; float32, or as float as time."""
        return self._point(time, self._sigma(time / FLOW_TIMESTEPS), ndim)

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of sigmas [B] in the sampling scale: only `time` is rounded, to the nearest thousandth."""
        nearest = (sigma.unsqueeze(-1) - self._sigmas.to(sigma.device)).abs().argmin(dim=-1)
        return self._point(nearest, sigma, ndim)

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the thousandths [B], fractions too, half way in half-log-SNR between thousandths t and s <= t, [B].

        Between two whole thousandths half-log-SNR is taken for linear.
        """
        return self._half_log_snr.midpoint(t, s)

    def to(self: _Even, device: torch.device | str) -> _Even:
        """Return the same schedule with its tables on a device."""
        moved = copy(self)
        moved._sigmas = self._sigmas.to(device)
        moved._half_log_snr = self._half_log_snr.to(device)
        return moved

    @abstractmethod
    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] of a run, 0 last."""

    @abstractmethod
    def _sigma(self, part: Tensor) -> Tensor:
        """Return the sigmas, in the sampling scale, at parts of the clock in [0, 1]; both [B]."""

    @abstractmethod
    def _training_level(self, sigma: Tensor) -> Level:
        """Return the level in the training scale of sigmas of any shape in the sampling scale."""

    @abstractmethod
    def _network_time(self, sigma: Tensor) -> Tensor:
        """Return what the network gets as its time, [B], at sigmas [B]."""

    def _point(self, time: Tensor, sigma: Tensor, ndim: int) -> TimePoint:
        return TimePoint(time, self._training_level(with_ndim(sigma, ndim)), self._network_time(sigma))

    @cached_property
    def _sigmas(self) -> Tensor:
        """[1001], ascending, by training time."""
        return self.sigmas_for(FLOW_TIMESTEPS).flip(0)

    @cached_property
    def _half_log_snr(self) -> HalfLogSNR:
        alpha, sigma = self._training_level(self._sigmas.double())
        return HalfLogSNR.of(torch.as_tensor(alpha**2 / (alpha**2 + sigma**2)))


class FlowSchedule(_EvenSchedule):
    """Rectified flow: x = (1 - sigma) x0 + sigma eps, with sigma as the flow time.

    shift: the model's sigma at times u in [0, 1], of any shape, float32, on any device, on the scale on which its steps
    are even; it rises from 0 to 1. The scale of training is that of sampling; network time is 1000 sigma.
    """

    def __init__(self, shift: Callable[[Tensor], Tensor] = lambda u: u) -> None:
        self._shift = shift

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1 - sigma, sigma)."""
        return Level(1 - sigma, sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return (1 - gamma) sigma_next."""
        return (1 - gamma) * sigma_next

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] at shifted times, evenly spaced from `denoise` to 0.

        Raises ValueError also if the model's shift does not give levels from 1 down to 0.
        """
        sigmas = self._shift(_even(steps, denoise))
        if not (sigmas.isfinite().all() and (sigmas.diff() <= 0).all()):
            raise ValueError("the model's shift gives no sigmas that descend from 1 to 0: set another shift, above 0")
        return sigmas

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] of flow times in thousandths, such as "1000,750,500,250", and 0 last.

        They are network times, and what diffusers prints as timesteps: the shift is in them already.
        """
        return to_zero(torch.tensor(parse_flow_times(timesteps)))

    def _sigma(self, part: Tensor) -> Tensor:
        return self._shift(part)

    def _training_level(self, sigma: Tensor) -> Level:
        return self.level(sigma)

    def _network_time(self, sigma: Tensor) -> Tensor:
        return FLOW_TIMESTEPS * sigma


class ContinuousSchedule(_EvenSchedule):
    """A variance exploding scale without timesteps (EDM and the like); its clock is flow time, u = sigma / (1 + sigma).

    sigma_max: where a run begins; 80 is EDM's own (arXiv 2206.00364). timestep: network time [B] at sigmas [B] on any
    device, sigma itself if it is not given. The level for training is variance preserving.
    """

    def __init__(self, sigma_max: float = 80.0, timestep: Callable[[Tensor], Tensor] = lambda sigma: sigma) -> None:
        self._sigma_max, self._timestep = sigma_max, timestep

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma)."""
        return Level(torch.ones_like(sigma), sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma at flow time (1 - gamma) u, where u = sigma_next / (1 + sigma_next)."""
        return _part_of_flow_time(sigma_next, 1 - gamma)

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] at flow times evenly spaced from `denoise` of that of sigma_max to 0."""
        return _part_of_flow_time(self._sigma_max, _even(steps, denoise).double()).float()

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Raise ValueError: there are none."""
        raise ValueError(
            f"timesteps is {timesteps!r}, but this model has none, as its time is its sigma: "
            "leave timesteps empty, and steps and denoise choose"
        )

    def _sigma(self, part: Tensor) -> Tensor:
        return _part_of_flow_time(self._sigma_max, part)

    def _training_level(self, sigma: Tensor) -> Level:
        # Not vp_level: 1 - alpha_bar would lose a small sigma.
        alpha = (1 + sigma**2) ** -0.5
        return Level(alpha, sigma * alpha)

    def _network_time(self, sigma: Tensor) -> Tensor:
        return self._timestep(sigma)


def _part_of_flow_time(sigma: Tensor | float, part: Tensor | float) -> Tensor:
    """Return the sigma whose flow time is this part of that of sigma, tensors of one shape or numbers."""
    # part u / (1 - part u), reduced: without a round trip, so that the whole of it is sigma to the last bit.
    return torch.as_tensor(part * sigma / (1 + (1 - part) * sigma))


def _even(steps: int, denoise: float) -> Tensor:
    """Return times [steps + 1], float32, evenly spaced from denoise down to 0; none for denoise = 0."""
    check_steps(steps, denoise)
    return torch.linspace(denoise, 0, steps + 1) if denoise else torch.zeros(0)
