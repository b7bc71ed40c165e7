"""Noise schedules and their clocks.

A time is told on one of four clocks, and every function here says which it takes:
  timestep        the integer training timestep, 0 .. 999
  flow time       in [0, 1]; of a rectified flow it equals sigma
  sigma           the noise level in the host's variance exploding scale, x = x0 + sigma * eps
  half-log-SNR    log(alpha / sigma); named in the paper, needed by no function here
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .timesteps import (
    ORIGIN_STEPS,
    check_steps,
    parse_flow_times,
    parse_timesteps,
    refined_origin_steps,
    timestep_grid,
)
from .trajectory import Level

# A schedule with zero terminal SNR ends at sigma = infinity. In the variance exploding scale a finite stand-in is
# needed; the host's choice, so that its sigmas and these tables meet.
TERMINAL_SIGMA = 4518.76


def scaled_linear_alpha_bar(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Return alpha_bar [T], float64, by timestep: betas linear in their square root, as in Stable Diffusion."""
    beta = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Rescale alpha_bar [T] so that the last one is exactly 0 and the first is kept (arXiv 2305.08891, algorithm 1)."""
    alpha = alpha_bar.sqrt()
    first, last = alpha[0], alpha[-1]
    return ((alpha - last) * first / (first - last)) ** 2


def alpha_bar_to_sigma(alpha_bar: Tensor) -> Tensor:
    """Convert alpha_bar, any shape, to a variance exploding sigma, sqrt((1 - alpha_bar) / alpha_bar); 0 gives inf."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def sigma_to_alpha_bar(sigma: Tensor) -> Tensor:
    """Convert a variance exploding sigma, any shape, to alpha_bar = 1 / (1 + sigma^2); inf gives 0."""
    return 1 / (1 + sigma**2)


def vp_level(alpha_bar: Tensor) -> Level:
    """Return the variance preserving level (sqrt(alpha_bar), sqrt(1 - alpha_bar)): the paper's scale, for training."""
    return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


class Schedule(Protocol):
    """What a run needs to know of a model's clock: levels, strategic targets, and where its N steps are."""

    def level(self, sigma: Tensor) -> Level:
        """Return the noise level of sigmas of any shape."""
        ...

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma of the strategic target s = (1 - gamma) t', told on the clock the model was trained on.

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


class DiscreteSchedule:
    """A variance exploding scale over integer timesteps: Stable Diffusion, and all trained on an alpha_bar table.

    sigmas: [T], ascending, one a timestep, float32 or float64; kept on the CPU. A distilled model that knows only each
    k-th of its timesteps has num_timesteps = k T; then its sigmas are of k - 1, 2 k - 1 ... k T - 1.

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
        """Build from alpha_bar [T]; an alpha_bar of exactly 0 (zero terminal SNR) becomes sigma = 4518.76."""
        sigmas = alpha_bar_to_sigma(alpha_bar)
        return cls(sigmas.masked_fill(sigmas.isinf(), TERMINAL_SIGMA))

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

    def _down_through(self, timesteps: list[int]) -> Tensor:
        return _to_zero(self.sigma(torch.tensor(timesteps, dtype=torch.int64)))


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


class FlowSchedule:
    """Rectified flow: x = (1 - sigma) x0 + sigma eps, with sigma as the flow time.

    shift: the model's sigma at times u in [0, 1], of any shape, float32, on the scale on which its steps are even; it
    rises from 0 to 1.
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

        They are what the network is told, and what diffusers prints as timesteps: the shift is in them already.
        """
        return _to_zero(torch.tensor(parse_flow_times(timesteps)))


class ContinuousSchedule:
    """A variance exploding scale without timesteps (EDM and the like); its clock is flow time, u = sigma / (1 + sigma).

    sigma_max: where a run begins; 80 is EDM's own (arXiv 2206.00364).
    """

    def __init__(self, sigma_max: float = 80.0) -> None:
        self._sigma_max = sigma_max

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


def _part_of_flow_time(sigma: Tensor | float, part: Tensor | float) -> Tensor:
    """Return the sigma whose flow time is this part of that of sigma, tensors of one shape or numbers."""
    # part u / (1 - part u), reduced: without a round trip, so that the whole of it is sigma to the last bit.
    return torch.as_tensor(part * sigma / (1 + (1 - part) * sigma))


def _even(steps: int, denoise: float) -> Tensor:
    """Return times [steps + 1], float32, evenly spaced from denoise down to 0; none for denoise = 0."""
    check_steps(steps, denoise)
    return torch.linspace(denoise, 0, steps + 1) if denoise else torch.zeros(0)


def _to_zero(sigmas: Tensor) -> Tensor:
    """Append the clean end to sigmas [N], unless there is no step to it."""
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if len(sigmas) else sigmas
