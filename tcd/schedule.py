"""Noise schedules: clocks, noise levels and grids of times, for sampling and for training.

Every function says which of these clocks its times are on:
  training time   a whole number, 0 at the clean end, so two times can be compared exactly. It is the timestep if the
                  model has a table of timesteps, otherwise thousandths, 0 .. 1000 (tcd/continuous_schedules.py)
  timestep        the integer training timestep, 0 .. T - 1; T is usually 1000
  flow time       in [0, 1]: sigma for a rectified flow, sigma / (1 + sigma) for EDM
  sigma           the noise level in the sampling scale: x = (1 - sigma) x0 + sigma eps for a rectified flow, otherwise
                  x = x0 + sigma * eps (variance exploding, as in the host)
  network time    the time that the network gets as input: the timestep, 1000 sigma for a flow, or a function of sigma
  half-log-SNR    log(alpha / sigma)

Training uses the paper's variance preserving scale, or the flow's own scale. It does not use the variance exploding
scale: there the distances grow with sigma, and the highest sigmas would dominate the loss.
"""

from copy import copy
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .levels import TERMINAL_SIGMA as TERMINAL_SIGMA
from .levels import HalfLogSNR, alpha_bar_to_sigma, append_zero, sigma_to_alpha_bar, vp_level, with_ndim
from .timesteps import ORIGIN_STEPS, parse_timesteps, refined_origin_steps, timestep_grid
from .trajectory import Level

_Schedule = TypeVar("_Schedule", bound="Schedule")
_Discrete = TypeVar("_Discrete", bound="DiscreteSchedule")


class TimePoint(NamedTuple):
    """B training times, with the noise level and the network time at each."""

    time: Tensor
    """[B], training times: int64, or floating point if they may lie between two whole ones."""
    level: Level
    """The noise level in the training scale; alpha and sigma are [B, 1, ...], so that they broadcast over x."""
    network_time: Tensor
    """[B], the time that the network gets as input."""

    def rows(self, index: Tensor | slice) -> "TimePoint":
        """Select rows of the batch. index: int64 [b] on the device of the tensors, or a slice."""
        alpha, sigma = (torch.as_tensor(part)[index] for part in self.level)
        return TimePoint(self.time[index], Level(alpha, sigma), self.network_time[index])


class Schedule(Protocol):
    """The noise schedule of a model. The nodes use the first four methods; the trainer also uses the rest."""

    def level(self, sigma: Tensor) -> Level:
        """Return the noise level (alpha, sigma) in the sampling scale, for sigmas of any shape."""
        ...

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma of the target time s = (1 - gamma) t', where t' is the time of sigma_next, of any shape.

        The times t' and s are on the clock that the model was trained on. The target is never above sigma_next, and
        equals it if gamma or sigma_next is 0.
        """
        ...

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] of a run, ending in 0, with steps evenly spaced on the model's clock.

        denoise: the fraction of the clock to use, from the clean end; 0 gives no sigmas. refine: choose timesteps from
        a finer grid if the distillation grid has fewer than `steps`. Raises ValueError, with advice, if steps or
        denoise is out of range.
        """
        ...

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] at N timesteps that a user typed, ending in 0.

        Raises ValueError, with advice, unless they are numbers, in range and strictly descending.
        """
        ...

    @property
    def num_times(self) -> int:
        """The number of whole training times: the number of timesteps if the model has them, otherwise 1001."""
        ...

    def grid(self, origin_steps: int) -> Tensor:
        """Return the distillation grid, int64, ascending: 0 and `origin_steps` evenly spaced training times.

        Raises ValueError if origin_steps is out of range.
        """
        ...

    def sampler_times(self, steps: int, origin_steps: int) -> list[int]:
        """Return the training times that a sampler of `steps` steps visits, descending, without the clean end.

        origin_steps: the size of the distillation grid that the sampler chooses from, if the model has timesteps.
        Raises ValueError if steps or origin_steps is out of range.
        """
        ...

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the levels and network times at training times [B], whole or fractional.

        time must be on the schedule's device (see `to`); the call does not wait for the device. ndim: the number of
        dimensions of the level's tensors.
        """
        ...

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points at sigmas [B] in the sampling scale; `time` is the nearest whole training time."""
        ...

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the training times [B], possibly fractional, that are halfway between t and s in half-log-SNR.

        t, s: training times [B], whole or fractional, with s <= t, on the schedule's device; the call does not wait for
        the device.
        """
        ...

    def to(self: _Schedule, device: torch.device | str) -> _Schedule:
        """Return a copy of the schedule with the tables of `point` and `midpoint` on a device."""
        ...


class DiscreteSchedule:
    """The schedule of a model with a table of integer timesteps, such as Stable Diffusion.

    sigmas: [T], one for each timestep, ascending, variance exploding, float32 or float64. They are used for sampling
    and stay on the CPU. num_timesteps: T by default. For a distilled model that knows only every k-th timestep, it is
    k T, and sigmas[i] belongs to timestep (i + 1) k - 1.

    A training time is a timestep, 0 .. num_timesteps - 1. The clean end, timestep 0, still has some noise: sigma =
    0.029 in Stable Diffusion. The levels for training are variance preserving.

    Raises ValueError unless the sigmas are positive, finite and strictly ascending, and num_timesteps is a multiple of
    T. With zero terminal SNR the last sigma is infinite: replace it by a finite one, or use from_alpha_bar.
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
        """Build from alpha_bar [T]. For sampling, an alpha_bar of 0 (zero terminal SNR) becomes sigma = 4518.76.

        For training, alpha_bar is kept as it is, in float32, so 0 stays 0.
        """
        sigmas = alpha_bar_to_sigma(alpha_bar)
        schedule = cls(sigmas.masked_fill(sigmas.isinf(), TERMINAL_SIGMA))
        schedule.alpha_bar = alpha_bar.detach().cpu().float()
        return schedule

    @cached_property
    def alpha_bar(self) -> Tensor:
        """[num_timesteps] float32, by timestep, for training; on the CPU, or on the device given to `to`."""
        return sigma_to_alpha_bar(self.sigma(torch.arange(self.num_timesteps)).double()).float()

    @cached_property
    def _half_log_snr(self) -> HalfLogSNR:
        return HalfLogSNR.of(self.alpha_bar)

    @property
    def num_times(self) -> int:
        """The number of timesteps."""
        return self.num_timesteps

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert sigmas of any shape to the nearest timesteps in log sigma, int64; sigma = 0 gives the lowest one."""
        distance = sigma.log().unsqueeze(-1) - self.sigmas.to(sigma.device).log()
        return (distance.abs().argmin(dim=-1) + 1) * self._skip - 1

    def sigma(self, timestep: Tensor) -> Tensor:
        """Convert timesteps of any shape to sigmas, interpolated linearly in log sigma between the known timesteps.

        Below the lowest and above the highest known timestep, sigma is constant.
        """
        place = ((timestep + 1) / self._skip - 1).clamp(0, len(self.sigmas) - 1)
        sigmas = self.sigmas.to(timestep.device)
        below, above = sigmas[place.floor().long()], sigmas[place.ceil().long()]
        return below * (above / below) ** place.frac()  # exact at a known timestep

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma) of sigmas of any shape."""
        return Level(torch.ones_like(sigma), sigma)

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma(s) with s = floor((1 - gamma) t'), of any shape; the product is float32, as the reference's."""
        if gamma == 0:
            return sigma_next  # it may lie between two timesteps, so it is not rounded to one
        # A Python float times an int64 tensor is float32, as in the reference: in float64 the floor could differ.
        s = torch.floor((1 - gamma) * self.timestep(sigma_next))
        return torch.minimum(self.sigma(s).to(sigma_next.dtype), sigma_next)

    def sigmas_for(self, steps: int, denoise: float = 1.0, *, refine: bool = False) -> Tensor:
        """Return the sigmas [steps + 1] at the timesteps of timestep_grid, ending in 0.

        The grid has 50 timesteps or, with `refine`, as many as refined_origin_steps says.
        """
        count = self.num_timesteps
        origin_steps = refined_origin_steps(steps, num_timesteps=count) if refine else ORIGIN_STEPS
        return self._down_through(timestep_grid(steps, num_timesteps=count, origin_steps=origin_steps, denoise=denoise))

    def sigmas_at(self, timesteps: str) -> Tensor:
        """Return the sigmas [N + 1] at whole timesteps, such as "999,759,499,259", ending in 0."""
        return self._down_through(parse_timesteps(timesteps, num_timesteps=self.num_timesteps))

    def grid(self, origin_steps: int) -> Tensor:
        """Return 0 and the origin_steps timesteps of timestep_grid, int64, ascending, without duplicates."""
        return torch.tensor(sorted({0, *self.sampler_times(origin_steps, origin_steps)}))

    def sampler_times(self, steps: int, origin_steps: int) -> list[int]:
        """Return the timesteps of timestep_grid, descending; raises ValueError if timestep_grid does."""
        return timestep_grid(steps, num_timesteps=self.num_timesteps, origin_steps=origin_steps)

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points at timesteps [B]: levels are variance preserving, float32; network time is the timestep.

        Between two timesteps, half-log-SNR is interpolated linearly; a level without signal counts as sigma = 4518.76.
        Below the lowest timestep that a distilled model knows, the level is constant.
        """
        between = time.is_floating_point()
        alpha_bar = (2 * self._half_log_snr.at(time)).sigmoid() if between else self.alpha_bar[time]
        return TimePoint(time, vp_level(with_ndim(alpha_bar, ndim)), time)

    def point_at(self, sigma: Tensor, ndim: int = 1) -> TimePoint:
        """Return the points at the timesteps nearest to sigmas [B], because the network knows only whole timesteps."""
        return self.point(self.timestep(sigma), ndim)

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the timesteps [B], possibly fractional, halfway in half-log-SNR between t and s <= t, [B] each."""
        return self._half_log_snr.midpoint(t, s)

    def to(self: _Discrete, device: torch.device | str) -> _Discrete:
        """Return a copy with the training tables on a device; `sigmas`, for sampling, stay on the CPU."""
        moved = copy(self)
        moved.alpha_bar = self.alpha_bar.to(device)
        moved._half_log_snr = self._half_log_snr.to(device)
        return moved

    def _down_through(self, timesteps: list[int]) -> Tensor:
        return append_zero(self.sigma(torch.tensor(timesteps, dtype=torch.int64)))


class BridgeSchedule(DiscreteSchedule):
    """The schedule of a model that turns one picture into another: x has no noise, so sampling can add none either."""

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma_next, of any shape. Raises ValueError if gamma is above 0, unless every sigma_next is 0."""
        if gamma > 0 and (sigma_next > 0).any():
            raise ValueError(
                f"gamma (eta) is {gamma:g}, but this model carries one picture into another and knows no noise: "
                "set it to 0, or go in one step"
            )
        return sigma_next

    def point(self, time: Tensor, ndim: int = 1) -> TimePoint:
        """Raise ValueError, because a model without noise has no training times."""
        raise ValueError(
            "this model carries one picture into another and knows no noise: its schedule cannot be trained on, as "
            "there is no x_t = alpha_t x0 + sigma_t eps"
        )
