"""Noise levels: alpha_bar tables, conversions between alpha_bar and sigma, and half-log-SNR by training time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .trajectory import Level

# A schedule with zero terminal SNR ends at sigma = infinity. This value replaces it where sigma must be finite: in the
# variance exploding scale and in half-log-SNR. The host uses the same value, so its sigmas and these tables agree.
TERMINAL_SIGMA = 4518.76


def scaled_linear_alpha_bar(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Return alpha_bar [T], float64, by timestep, for betas whose square roots are evenly spaced.

    These are the betas of Stable Diffusion (arXiv 2112.10752); alpha_bar is the product of 1 - beta (arXiv 2006.11239).
    """
    beta = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, dim=0)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Rescale alpha_bar [T] so that the last one is exactly 0 and the first is kept (arXiv 2305.08891, algorithm 1)."""
    alpha = alpha_bar.sqrt()
    first, last = alpha[0], alpha[-1]
    return ((alpha - last) * first / (first - last)) ** 2


def alpha_bar_to_sigma(alpha_bar: Tensor) -> Tensor:
    """Convert alpha_bar of any shape to variance exploding sigma, sqrt((1 - alpha_bar) / alpha_bar); 0 gives inf.

    x / sqrt(alpha_bar) = x0 + sigma eps, the scale of arXiv 2206.00364.
    """
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def sigma_to_alpha_bar(sigma: Tensor) -> Tensor:
    """Convert variance exploding sigma of any shape to alpha_bar = 1 / (1 + sigma^2), the inverse; inf gives 0."""
    return 1 / (1 + sigma**2)


def vp_level(alpha_bar: Tensor) -> Level:
    """Return the variance preserving level (sqrt(alpha_bar), sqrt(1 - alpha_bar)) of alpha_bar of any shape.

    This is the scale of training in arXiv 2402.19159.
    """
    return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def with_ndim(values: Tensor, ndim: int) -> Tensor:
    """Reshape values [B] to ndim dimensions, [B, 1, ...], so that they broadcast over x."""
    return values.reshape(-1, *[1] * (ndim - 1))


def append_zero(sigmas: Tensor) -> Tensor:
    """Append 0, the clean end, to sigmas [N]; an empty tensor stays empty."""
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if len(sigmas) else sigmas


@dataclass(frozen=True)
class HalfLogSNR:
    """Half-log-SNR, log(alpha / sigma), by training time: tabulated at whole times, linear between them."""

    table: Tensor
    """[T] float32, by whole training time, finite, descending."""

    @classmethod
    def of(cls, alpha_bar: Tensor) -> "HalfLogSNR":
        """Build from alpha_bar [T] by training time; in general, alpha_bar is alpha^2 / (alpha^2 + sigma^2).

        Values are clamped to the half-log-SNR of variance exploding sigmas from 1 / 4518.76 to 4518.76, so levels
        without noise or without signal are finite too.
        """
        lowest = sigma_to_alpha_bar(torch.tensor(TERMINAL_SIGMA)).item()
        half_log_snr = torch.logit(alpha_bar.clamp(min=lowest)) / 2
        return cls(half_log_snr.clamp(max=math.log(TERMINAL_SIGMA)).float())

    def at(self, time: Tensor) -> Tensor:
        """Return the half-log-SNR [B] at training times [B], whole or fractional."""
        if not time.is_floating_point():
            return self.table[time]
        below = time.long().clamp(max=len(self.table) - 2)
        return torch.lerp(self.table[below], self.table[below + 1], (time - below).to(self.table.dtype))

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the times [B], possibly fractional, halfway in half-log-SNR between times t and s <= t, [B] each."""
        middle = (self.at(t) + self.at(s)) / 2
        above = torch.searchsorted(-self.table, -middle).clamp(min=1)
        low, high = self.table[above - 1], self.table[above]
        # Two clamped levels can be equal, and their difference must not be 0. Any time from s to t is then a midpoint.
        fall = (high - low).clamp(max=-torch.finfo(low.dtype).tiny)
        middle_time = above - 1 + (middle - low) / fall
        return torch.maximum(torch.minimum(middle_time, t.to(low.dtype)), s.to(low.dtype))

    def to(self, device: torch.device | str) -> "HalfLogSNR":
        """Return a copy with its table on a device."""
        return HalfLogSNR(self.table.to(device))
