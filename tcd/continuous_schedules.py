"""Schedules of models whose time is continuous: rectified flow (SD3, Flux) and EDM.

A clock runs from 0, without noise, to 1, and training times count its thousandths, 0 .. 1000. The clock of FlowSchedule
is the model's time u before the shift. The clock of ContinuousSchedule is flow time, sigma / (1 + sigma), divided by
its value at sigma_max. Sampling steps and distillation grids are evenly spaced on the clock.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from .levels import HalfLogSNR, append_zero, with_ndim
from .schedule import TimePoint
from .timesteps import FLOW_TIMESTEPS, check_steps, even_grid, parse_flow_times
from .trajectory import Level

_Even = TypeVar("_Even", bound="_EvenSchedule")


class _EvenSchedule(ABC):
    """The common part of both schedules: training times as thousandths of the clock, and their points."""

    @property
    def num_times(self) -> int:
        """1001: the whole thousandths 0 .. 1000."""
        return FLOW_TIMESTEPS + 1

    def grid(self, origin_steps: int) -> Tensor:
        """Return 0, 1000 / origin_steps ... 1000, each rounded to a whole number, int64 [origin_steps + 1].

        Raises ValueError unless origin_steps is from 1 to 1000.
        """
        return torch.tensor(even_grid(origin_steps))

    def sampler_times(self, steps: int, origin_steps: int) -> list[int]:
        """Return the times of sigmas_for(steps), descending, in whole thousandths, without the final 0.

        origin_steps is ignored, because steps are chosen from the whole clock. Raises ValueError unless steps is from
        1 to 1000.
        """
        return even_grid(steps)[:0:-1]

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points at thousandths [B], whole or fractional; in float32, or in float64 if time is float64."""
        return self._point(time, self._sigma(time / FLOW_TIMESTEPS), ndim)

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points at sigmas [B] in the sampling scale; only `time` is rounded, to the nearest thousandth."""
        nearest = (sigma.unsqueeze(-1) - self._sigmas.to(sigma.device)).abs().argmin(dim=-1)
        return self._point(nearest, sigma, ndim)

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the thousandths [B], possibly fractional, halfway in half-log-SNR between t and s <= t, [B] each.

        Half-log-SNR is interpolated linearly between whole thousandths.
        """
        return self._half_log_snr.midpoint(t, s)

    def to(self: _Even, device: torch.device | str) -> _Even:
        """Return a copy with its tables on a device."""
        moved = copy(self)
        moved._sigmas = self._sigmas.to(device)
        moved._half_log_snr = self._half_log_snr.to(device)
        return moved

    @abstractmethod
    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] of a run, ending in 0."""

    @abstractmethod
    def _sigma(self, part: Tensor) -> Tensor:
        """Return the sigmas [B], in the sampling scale, at clock times [B] in [0, 1]."""

    @abstractmethod
    def _training_level(self, sigma: Tensor) -> Level:
        """Convert sigmas of any shape, in the sampling scale, to levels in the training scale."""

    @abstractmethod
    def _network_time(self, sigma: Tensor) -> Tensor:
        """Return the network times [B] at sigmas [B]."""

    def _point(self, time: Tensor, sigma: Tensor, ndim: int) -> TimePoint:
        return TimePoint(time, self._training_level(with_ndim(sigma, ndim)), self._network_time(sigma))

    @cached_property
    def _sigmas(self) -> Tensor:
        """[1001], sigma by training time, ascending."""
        return self.sigmas_for(FLOW_TIMESTEPS).flip(0)

    @cached_property
    def _half_log_snr(self) -> HalfLogSNR:
        alpha, sigma = self._training_level(self._sigmas.double())
        return HalfLogSNR.of(torch.as_tensor(alpha**2 / (alpha**2 + sigma**2)))


class FlowSchedule(_EvenSchedule):
    """The schedule of a rectified flow: x = (1 - sigma) x0 + sigma eps, in sampling and in training.

    shift: a rising function from the clock time u in [0, 1] to sigma in [0, 1], for float32 tensors of any shape on any
    device. Sampling steps are evenly spaced in u. The network time is 1000 sigma.
    """

    def __init__(self, shift: Callable[[Tensor], Tensor] = lambda u: u) -> None:
        self._shift = shift

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1 - sigma, sigma) of sigmas of any shape."""
        return Level(1 - sigma, sigma)

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return (1 - gamma) sigma_next, of any shape: sigma is the flow time."""
        return (1 - gamma) * sigma_next

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] at clock times u evenly spaced from `denoise` to 0.

        Raises ValueError if steps or denoise is out of range, or if the model's shift gives sigmas that do not descend.
        """
        sigmas = self._shift(_even(steps, denoise))
        if not (sigmas.isfinite().all() and (sigmas.diff() <= 0).all()):
            raise ValueError("the model's shift gives no sigmas that descend from 1 to 0: set another shift, above 0")
        return sigmas

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] at flow times in thousandths, such as "1000,750,500,250", ending in 0.

        These are network times, 1000 sigma, which diffusers prints as timesteps; the shift is already applied to them.
        """
        return append_zero(torch.tensor(parse_flow_times(timesteps)))

    def _sigma(self, part: Tensor) -> Tensor:
        return self._shift(part)

    def _training_level(self, sigma: Tensor) -> Level:
        return self.level(sigma)

    def _network_time(self, sigma: Tensor) -> Tensor:
        return FLOW_TIMESTEPS * sigma


class ContinuousSchedule(_EvenSchedule):
    """The schedule of a variance exploding model without timesteps, such as EDM.

    sigma_max: the sigma at which a run begins; EDM uses 80 (arXiv 2206.00364). timestep: a function from sigmas [B] to
    network times [B], on any device; by default the network time is sigma itself. The levels for training are variance
    preserving.
    """

    def __init__(self, sigma_max: float = 80.0, timestep: Callable[[Tensor], Tensor] = lambda sigma: sigma) -> None:
        self._sigma_max, self._timestep = sigma_max, timestep

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma) of sigmas of any shape."""
        return Level(torch.ones_like(sigma), sigma)

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma at flow time (1 - gamma) u, where u = sigma_next / (1 + sigma_next); of any shape."""
        return _part_of_flow_time(sigma_next, 1 - gamma)

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] at clock times evenly spaced from `denoise` to 0; time 1 is sigma_max."""
        return _part_of_flow_time(self._sigma_max, _even(steps, denoise).double()).float()

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Raise ValueError, because the model has no timesteps."""
        raise ValueError(
            f"timesteps is {timesteps!r}, but this model has none, as its time is its sigma: "
            "leave timesteps empty, and steps and denoise choose"
        )

    def _sigma(self, part: Tensor) -> Tensor:
        return _part_of_flow_time(self._sigma_max, part)

    def _training_level(self, sigma: Tensor) -> Level:
        # Not vp_level, because 1 - alpha_bar rounds a small sigma to 0.
        alpha = (1 + sigma**2) ** -0.5
        return Level(alpha, sigma * alpha)

    def _network_time(self, sigma: Tensor) -> Tensor:
        return self._timestep(sigma)


def _part_of_flow_time(sigma: Tensor | float, part: Tensor | float) -> Tensor:
    """Multiply the flow time of `sigma` by `part`, and return the sigma there; tensors of one shape, or numbers."""
    # part u / (1 - part u) with u = sigma / (1 + sigma), simplified so that part = 1 returns sigma exactly.
    return torch.as_tensor(part * sigma / (1 + (1 - part) * sigma))


def _even(steps: int, denoise: float) -> Tensor:
    """Return clock times [steps + 1], float32, evenly spaced from denoise down to 0; empty if denoise is 0."""
    check_steps(steps, denoise)
    return torch.linspace(denoise, 0, steps + 1) if denoise else torch.zeros(0)
