"""Data ~ N(MEAN, STD^2), whose trajectories have a closed form; points in float64; and seeded normal numbers."""

import torch
from torch import Tensor

from trajectory_consistency.tcd import Level, Schedule, TimePoint
from trajectory_consistency.tcd.times import Points, Times

MEAN, STD = 0.7, 0.4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_map(x: Tensor, t: Level, s: Level) -> Tensor:
    """Follow the exact trajectory of data ~ N(MEAN, STD^2): the standardized score of x stays what it is."""
    spread = ((s.alpha**2 * STD**2 + s.sigma**2) / (t.alpha**2 * STD**2 + t.sigma**2)).sqrt()
    return s.alpha * MEAN + spread * (x - t.alpha * MEAN)


def x0_for_target(x: Tensor, t: Level, s: Level) -> Tensor:
    """The x0 that a network with target time s must predict, so that the jump follows a Gaussian's exact trajectory."""
    ratio = s.sigma / t.sigma
    return (gaussian_map(x, t, s) - ratio * x) / (s.alpha - ratio * t.alpha)


def target_time_network(x: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
    """That network, as the loss calls it."""
    return x0_for_target(x, t.level, s.level)


def points_of(schedule: Schedule, times: Times, ndim: int = 4) -> Points:
    """The points of three times, as a training step makes them."""
    return Points(*(schedule.point(time, ndim) for time in times))


def in_float64(point: TimePoint) -> TimePoint:
    """The same point, with levels in which arithmetic is exact enough to be held to 1e-12."""
    alpha, sigma = (torch.as_tensor(part).double() for part in point.level)
    return point._replace(level=Level(alpha, sigma))


def half_log_snr(level: Level) -> Tensor:
    """log(alpha / sigma) in float64; infinite without noise or signal."""
    alpha, sigma = (torch.as_tensor(part).double() for part in level)
    return (alpha / sigma).log()
