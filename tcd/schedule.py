"""Noise schedules and their clocks: levels, times and grids, for sampling and for training.

A time is on one of these clocks, and every function here says which it takes:
  training time   a whole number on every clock, so that two of them are equal or not; 0 is the clean end. Of a model
                  with a table, the timestep 0 .. T - 1; else thousandths, 0 .. 1000 (tcd/continuous_schedules.py)
  timestep        the integer training timestep, 0 .. 999
  flow time       in [0, 1]; of a rectified flow it equals sigma
  sigma           the noise level in the sampling scale: of a rectified flow, x = (1 - sigma) x0 + sigma eps; else the
                  host's variance exploding one, x = x0 + sigma * eps
  network time    what the network gets as its time: the timestep, 1000 sigma of a flow, or a function of sigma
  half-log-SNR    log(alpha / sigma)

Training is in the paper's scale: variance preserving, or that of the flow itself. The variance exploding one is for
sampling alone: a loss in it would be that of the highest sigmas.
"""

from copy import copy
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .levels import TERMINAL_SIGMA as TERMINAL_SIGMA
from .levels import HalfLogSNR, alpha_bar_to_sigma, sigma_to_alpha_bar, to_zero, vp_level, with_ndim
from .timesteps import ORIGIN_STEPS, parse_timesteps, refined_origin_steps, timestep_grid
from .trajectory import Level

_Schedule = TypeVar("_Schedule", bound="Schedule")
_Discrete = TypeVar("_Discrete", bound="DiscreteSchedule")


class TimePoint(NamedTuple):
    """A training time as the equations and the network meet it; B of them."""

    time: Tensor
    """[B], training times: int64, or floating where they lie between two."""
    level: Level
    """The noise level in the training scale, each part a tensor [B, 1, ...] that broadcasts over x."""
    network_time: Tensor
    """[B], the time on the network's own clock."""

    def rows(self, index: Tensor | slice) -> "TimePoint":
        """Return those of some rows of the batch: int64 [b] on the device of the tensors, or a slice."""
        alpha, sigma = (torch.as_tensor(part)[index] for part in self.level)
        return TimePoint(self.time[index], Level(alpha, sigma), self.network_time[index])


class Schedule(Protocol):
    """What sampling and training need to know of a model's clock.

    Sampling: levels, strategic targets, and where N steps are. Training: the grid, and what is at a training time.
    """

    def level(self, sigma: Tensor) -> Level:
        """Return the noise level, in the sampling scale, of sigmas of any shape."""
        ...

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma of the strategic target s = (1 - gamma) t', on the clock the model was trained on.

        sigma_next is of any shape. The target is never above it, and is sigma_next itself when gamma or sigma_next
        is 0.
        """
        ...

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] of a run, 0 last: evenly spaced over the lower part `denoise` of the clock.

        Empty if denoise is 0. refine: a clock with a grid takes a finer one where its own has too few timesteps.
        Raises ValueError, which says what to do, when steps or denoise are out of range.
        """
        ...

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] at N timesteps that a person typed, and 0 last.

        Raises ValueError, which says what to type, when they are not numbers, in range and strictly descending.
        """
        ...

    @property
    def num_times(self) -> int:
        """How many whole training times there are: T timesteps, or 1001."""
        ...

    def grid(self, origin_steps: int) -> Tensor:
        """Return the training times of the distillation grid, int64 [N + 1], ascending, the clean end 0 first.

        Its levels above the clean end are those of a run of as many steps (sigmas_for). Raises ValueError when
        origin_steps is out of range.
        """
        ...

    def visited(self, steps: int, origin_steps: int) -> list[int]:
        """Return the training times that a sampler of so many steps visits, descending, without the clean end.

        Raises ValueError when steps or origin_steps are out of range.
        """
        ...

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of training times [B], whole numbers or fractions; the level's parts have ndim dimensions.

        time is on the device of the schedule (`to`), and the device is not waited for.
        """
        ...

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of sigmas [B] in the sampling scale; their training times are the nearest whole ones."""
        ...

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the training times [B], fractions too, half way in half-log-SNR between times t and s <= t, [B].

        t and s are whole numbers or fractions on the device of the schedule, and the device is not waited for.
        """
        ...

    def to(self: _Schedule, device: torch.device | str) -> _Schedule:
        """Return the same schedule with the tables that point and midpoint look into on a device."""
        ...


class DiscreteSchedule:
    """A variance exploding scale over integer timesteps: Stable Diffusion, and all trained on an alpha_bar table.

    sigmas: [T], ascending, one a timestep, float32 or float64; for sampling, and kept on the CPU. A distilled model
    that knows only each k-th of its timesteps has num_timesteps = k T; its sigmas are of k - 1, 2 k - 1 ... k T - 1.

    A training time is a timestep, 0 .. num_timesteps - 1. The clean end, 0, is the cleanest there is, but not without
    noise: sigma = 0.029 in Stable Diffusion. The level for training is variance preserving.

    Raises ValueError if the sigmas are not positive, finite and strictly ascending (who has zero terminal SNR gives a
    finite stand-in or uses from_alpha_bar), or num_timesteps is no multiple of T.
    """

    def __init__(self, sigmas: Tensor, *, num_timesteps: int | None = None) -> None:
        sigmas = sigmas.detach().cpu()
        if sigmas.ndim != 1 or len(sigmas) == 0:
            raise ValueError(f"sigmas has shape {list(sigmas.shape)}, but must be [T] with one sigma a timestep")
        if not (sigmas.isfinite().all() and sigmas[0] > 0 and (sigmas.diff() > 0).all()):
            raise ValueError("sigmas must be positive, finite and strictly ascending, one a timestep")
        self.sigmas = sigmas
        self.num_timesteps = len(sigmas) if num_timesteps is None else num_timesteps
        self._skip, rest = divmod(self.num_timesteps, len(sigmas))
        if rest or self._skip < 1:
            raise ValueError(f"num_timesteps is {num_timesteps!r}, but must be a multiple of the {len(sigmas)} sigmas")

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor) -> "DiscreteSchedule":
        """Build from alpha_bar [T]; an alpha_bar of exactly 0 (zero terminal SNR) becomes sigma = 4518.76.

        For training the table is kept as it is, in float32: there, 0 stays 0.
        """
        sigmas = alpha_bar_to_sigma(alpha_bar)
        schedule = cls(sigmas.masked_fill(sigmas.isinf(), TERMINAL_SIGMA))
        schedule.alpha_bar = alpha_bar.detach().cpu().float()
        return schedule

    @cached_property
    def alpha_bar(self) -> Tensor:
        """[num_timesteps] float32 by timestep, for training; on the CPU, or the device that `to` was given."""
        return sigma_to_alpha_bar(self.sigma(torch.arange(self.num_timesteps)).double()).float()

    @cached_property
    def _half_log_snr(self) -> HalfLogSNR:
        return HalfLogSNR.of(self.alpha_bar)

    @property
    def num_times(self) -> int:
        """num_timesteps."""
        return self.num_timesteps

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timestep, int64, nearest to a sigma of any shape in log sigma; sigma = 0 gives the lowest."""
        distance = sigma.log().unsqueeze(-1) - self.sigmas.to(sigma.device).log()
        return (distance.abs().argmin(dim=-1) + 1) * self._skip - 1

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the sigma of timesteps of any shape; log sigma is linear between those known, and ends at them."""
        place = ((timestep + 1) / self._skip - 1).clamp(0, len(self.sigmas) - 1)
        sigmas = self.sigmas.to(timestep.device)
        below, above = sigmas[place.floor().long()], sigmas[place.ceil().long()]
        return below * (above / below) ** place.frac()  # at a timestep that is known: its sigma to the last bit

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma)."""
        return Level(torch.ones_like(sigma), sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma(s) with s = floor((1 - gamma) t'), the product in float32 as in the reference scheduler."""
        if gamma == 0:
            return sigma_next  # which may lie between two timesteps
        # A Python float times an int64 tensor is a float32 product: what the reference takes the floor of.
        s = torch.floor((1 - gamma) * self.timestep(sigma_next))
        return torch.minimum(self.sigma(s).to(sigma_next.dtype), sigma_next)

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] of timestep_grid's timesteps, and 0 last; refine: as refined_origin_steps."""
        count = self.num_timesteps
        origin_steps = refined_origin_steps(steps, num_timesteps=count) if refine else ORIGIN_STEPS
        return self._down_through(timestep_grid(steps, num_timesteps=count, origin_steps=origin_steps, denoise=denoise))

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] of whole timesteps, such as "999,759,499,259", and 0 last."""
        return self._down_through(parse_timesteps(timesteps, num_timesteps=self.num_timesteps))

    def grid(self, origin_steps: int) -> Tensor:
        """Return 0 and the timesteps of timestep_grid, int64, ascending; with origin_steps = T, 0 is one of these."""
        return torch.tensor(sorted({0, *self.visited(origin_steps, origin_steps)}))

    def visited(self, steps: int, origin_steps: int) -> list[int]:
        """Return timestep_grid's timesteps, descending; raises ValueError as it does."""
        return timestep_grid(steps, num_timesteps=self.num_timesteps, origin_steps=origin_steps)

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of timesteps [B], level variance preserving and float32; network time: the timestep itself.

        Between two timesteps half-log-SNR is linear, with 4518.76 for the sigma of a level without signal. Below the
        lowest timestep known to a distilled model, the level is the one at that timestep.
        """
        between = time.is_floating_point()
        alpha_bar = (2 * self._half_log_snr.at(time)).sigmoid() if between else self.alpha_bar[time]
        return TimePoint(time, vp_level(with_ndim(alpha_bar, ndim)), time)

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points of the timesteps nearest to sigmas [B], variance exploding: the network knows no others."""
        return self.point(self.timestep(sigma), ndim)

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the timesteps [B], fractions too, half way in half-log-SNR between timesteps t and s <= t, [B]."""
        return self._half_log_snr.midpoint(t, s)

    def to(self: _Discrete, device: torch.device | str) -> _Discrete:
        """Return the same schedule with its training tables on a device; `sigmas` stay on the CPU, for sampling."""
        moved = copy(self)
        moved.alpha_bar = self.alpha_bar.to(device)
        moved._half_log_snr = self._half_log_snr.to(device)
        return moved

    def _down_through(self, timesteps: list[int]) -> Tensor:
        return to_zero(self.sigma(torch.tensor(timesteps, dtype=torch.int64)))


class BridgeSchedule(DiscreteSchedule):
    """Timesteps of a model that carries one picture into another: with no noise in x, there is none to renew."""

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma_next. Raises ValueError if gamma is above 0 and there is a step before the last."""
        if gamma > 0 and (sigma_next > 0).any():
            raise ValueError(
                f"gamma (eta) is {gamma:g}, but this model carries one picture into another and knows no noise: "
                "set it to 0, or go in one step"
            )
        return sigma_next

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Raise ValueError: there is no training time without noise."""
        raise ValueError(
            "this model carries one picture into another and knows no noise: its schedule cannot be trained on, as "
            "there is no x_t = alpha_t x0 + sigma_t eps"
        )
