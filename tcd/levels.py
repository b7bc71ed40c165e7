"""Noise levels: alpha_bar tables and their conversions, and half-log-SNR by training time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .trajectory import Level

# A schedule with zero terminal SNR ends at sigma = infinity. In the variance exploding scale, and in half-log-SNR, a
# finite stand-in is needed; the host's choice, so that its sigmas and these tables meet.
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


def with_ndim(values: Tensor, ndim: int) -> Tensor:
    """Return values [B] with ndim dimensions, [B, 1, ...], so that they broadcast over x."""
    return values.reshape(-1, *[1] * (ndim - 1))


def to_zero(sigmas: Tensor) -> Tensor:
    """Append the clean end to sigmas [N], unless there is no step to it."""
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if len(sigmas) else sigmas


@dataclass(frozen=True)
class HalfLogSNR:
    """Half-log-SNR, log(alpha / sigma), by training time: the table of all whole ones, and linear between two."""

    table: Tensor
    """[T] float32, finite, descending."""

    @classmethod
    def of(cls, alpha_bar: Tensor) -> "HalfLogSNR":
        """Build from alpha_bar [T] by training time; of another scale's levels, alpha^2 / (alpha^2 + sigma^2).

        A level without signal or without noise gets the half-log-SNR of sigma = 4518.76 or 1 / 4518.76, and so does one
        beyond these.
        """
        lowest = sigma_to_alpha_bar(torch.tensor(TERMINAL_SIGMA)).item()
        half_log_snr = torch.logit(alpha_bar.clamp(min=lowest)) / 2
        return cls(half_log_snr.clamp(max=math.log(TERMINAL_SIGMA)).float())

    def at(self, time: Tensor) -> Tensor:
        """Return the half-log-SNR [B] of training times [B], whole numbers or fractions."""
        if not time.is_floating_point():
            return self.table[time]
        below = time.long().clamp(max=len(self.table) - 2)
        return torch.lerp(self.table[below], self.table[below + 1], (time - below).to(self.table.dtype))

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the training times [B], fractions too, half way in half-log-SNR between times t and s <= t, [B]."""
        middle = (self.at(t) + self.at(s)) / 2
        above = torch.searchsorted(-self.table, -middle).clamp(min=1)
        low, high = self.table[above - 1], self.table[above]
        # Levels beyond a stand-in share it: there, nothing must be divided by 0, and any time from s to t serves.
        fall = (high - low).clamp(max=-torch.finfo(low.dtype).tiny)
        middle_time = above - 1 + (middle - low) / fall
        return torch.maximum(torch.minimum(middle_time, t.to(low.dtype)), s.to(low.dtype))

    def to(self, device: torch.device | str) -> "HalfLogSNR":
        """Return the same with its table on a device."""
        return HalfLogSNR(self.table.to(device))
