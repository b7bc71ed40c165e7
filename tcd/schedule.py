"""Noise schedules and their clocks.

A time is told on one of four clocks, and every function here says which it takes:
  timestep        the integer training timestep, 0 .. 999
  flow time       in [0, 1]; of a rectified flow it equals sigma
  sigma           the noise level in the host's variance exploding scale, x = x0 + sigma * eps
  half-log-SNR    log(alpha / sigma); named in the paper, needed by no function here
"""

import math
from typing import Protocol

import torch
from torch import Tensor

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


def timestep_grid(steps: int, *, num_timesteps: int = 1000, origin_steps: int = 50, denoise: float = 1.0) -> list[int]:
    """Choose `steps` timesteps, descending, among those on which the student was distilled.

    The distillation grid is 19, 39, ..., 999 (num_timesteps / origin_steps apart). Of it, the lower part `denoise` is
    kept and divided evenly from its top: 4 steps are 999, 759, 499, 259. denoise = 0 gives no timestep.

    Raises ValueError when steps is not a whole number >= 1 or exceeds the timesteps kept, or denoise is not in [0, 1].
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}, but must be a whole number from 1 to {origin_steps}")
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise is {denoise!r}, but must be from 0.0 to 1.0")
    if not 1 <= origin_steps <= num_timesteps:
        raise ValueError(f"origin_steps is {origin_steps!r}, but must be from 1 to num_timesteps ({num_timesteps})")
    if denoise == 0:
        return []
    kept = int(origin_steps * denoise)
    if steps > kept:
        raise ValueError(_too_many_steps(steps, kept, origin_steps, denoise))
    skip = num_timesteps // origin_steps
    return [(kept - i * kept // steps) * skip - 1 for i in range(steps)]


def _too_many_steps(steps: int, kept: int, origin_steps: int, denoise: float) -> str:
    remedies = [f"steps of at most {kept}"] if kept else []
    if steps <= origin_steps:
        remedies.append(f"denoise of at least {steps / origin_steps:g}")
    return (
        f"steps is {steps}, but denoise {denoise:g} keeps {kept} of the {origin_steps} distilled timesteps: "
        f"use {' or '.join(remedies)}"
    )


def parse_timesteps(text: str, *, num_timesteps: int = 1000) -> list[int]:
    """Read timesteps that a person typed, such as "800" or "999,759,499,259", strictly descending.

    Raises ValueError, which says what to type, for anything else.
    """
    hint = f"type whole numbers from {num_timesteps - 1} down to 0 with commas between, such as 999,759,499,259"
    try:
        timesteps = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"timesteps is {text!r}: {hint}") from None
    for timestep in timesteps:
        if not 0 <= timestep < num_timesteps:
            raise ValueError(f"timesteps has {timestep}, out of range: {hint}")
    for before, after in zip(timesteps, timesteps[1:], strict=False):
        if after >= before:
            raise ValueError(f"timesteps has {after} after {before}, but must descend: {hint}")
    return timesteps


class Schedule(Protocol):
    """What the sampler needs to know of a model's clock. Sigmas are 0-dim, of the list that the sampler was given."""

    def level(self, sigma: Tensor) -> Level:
        """Return the noise level of a sigma."""
        ...

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma of the strategic target s = (1 - gamma) t', told on the clock the model was trained on.

        It is never above sigma_next, and is sigma_next itself when gamma or sigma_next is 0.
        """
        ...


class DiscreteSchedule:
    """A variance exploding scale over integer timesteps: Stable Diffusion, and all trained on an alpha_bar table.

    sigmas: [T], ascending, one a timestep, float32 or float64; kept on the CPU. Raises ValueError if they are not
    positive, finite and strictly ascending: who has zero terminal SNR gives a finite stand-in or uses from_alpha_bar.
    """

    def __init__(self, sigmas: Tensor) -> None:
        sigmas = sigmas.detach().cpu()
        if sigmas.ndim != 1 or len(sigmas) == 0:
            raise ValueError(f"sigmas has shape {list(sigmas.shape)}, but must be [T] with one sigma a timestep")
        if not (sigmas.isfinite().all() and sigmas[0] > 0 and (sigmas.diff() > 0).all()):
            raise ValueError("sigmas must be positive, finite and strictly ascending, one a timestep")
        self.sigmas = sigmas

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor) -> "DiscreteSchedule":
        """Build from alpha_bar [T]; an alpha_bar of exactly 0 (zero terminal SNR) becomes sigma = 4518.76."""
        sigmas = alpha_bar_to_sigma(alpha_bar)
        return cls(sigmas.masked_fill(sigmas.isinf(), TERMINAL_SIGMA))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timestep, int64, nearest to a sigma of any shape in log sigma; sigma = 0 gives 0."""
        distance = sigma.log().unsqueeze(-1) - self.sigmas.to(sigma.device).log()
        return distance.abs().argmin(dim=-1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the sigma of an int64 timestep of any shape."""
        return self.sigmas.to(timestep.device)[timestep]

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma)."""
        return Level(torch.ones_like(sigma), sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma(s) with s = floor((1 - gamma) t'), the product in float32 as in the reference scheduler."""
        if gamma == 0:
            return sigma_next  # which may lie between two timesteps
        # A Python float times an int64 tensor is a float32 product: what the reference takes the floor of.
        s = torch.floor((1 - gamma) * self.timestep(sigma_next)).to(torch.int64)
        return torch.minimum(self.sigma(s).to(sigma_next.dtype), sigma_next)


class FlowSchedule:
    """Rectified flow: x = (1 - sigma) x0 + sigma eps, with sigma as the flow time."""

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1 - sigma, sigma)."""
        return Level(1 - sigma, sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return (1 - gamma) sigma_next."""
        return (1 - gamma) * sigma_next


class ContinuousSchedule:
    """A variance exploding scale without timesteps (EDM and the like), whose strategic target is on the flow clock."""

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma)."""
        return Level(torch.ones_like(sigma), sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return the sigma at flow time (1 - gamma) u, where u = sigma_next / (1 + sigma_next)."""
        # u_s / (1 - u_s), reduced: without a round trip, so that gamma = 0 gives sigma_next to the last bit.
        return (1 - gamma) * sigma_next / (1 + gamma * sigma_next)
