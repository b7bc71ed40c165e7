"""Data ~ N(MEAN, STD^2), whose trajectories have a closed form; and seeded normal numbers."""

import torch
from torch import Tensor

from trajectory_consistency.tcd import Level

MEAN, STD = 0.7, 0.4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_map(x: Tensor, t: Level, s: Level) -> Tensor:
    """Follow the exact trajectory of data ~ N(MEAN, STD^2): the standardized score of x stays what it is."""
    spread = ((s.alpha**2 * STD**2 + s.sigma**2) / (t.alpha**2 * STD**2 + t.sigma**2)).sqrt()
    return s.alpha * MEAN + spread * (x - t.alpha * MEAN)


def told_x0(x: Tensor, t: Level, s: Level) -> Tensor:
    """The x0 that a network told s must predict for the jump to follow the exact trajectory of a Gaussian."""
    ratio = s.sigma / t.sigma
    return (gaussian_map(x, t, s) - ratio * x) / (s.alpha - ratio * t.alpha)


def half_log_snr(level: Level) -> Tensor:
    """log(alpha / sigma) in float64; infinite without noise or signal."""
    alpha, sigma = (torch.as_tensor(part).double() for part in level)
    return (alpha / sigma).log()
