"""What is measured of points against others: how far the two are apart, and how much of one is in the other."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Reference:
    """Points [M, D] that others are measured against."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    @cached_property
    def within(self) -> float:
        """The mean distance of two of them."""
        return _within(self.points)


def energy_distance(points: Tensor, reference: Reference) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of points [N, D]; unbiased, so around 0 for equal laws."""
    across = torch.cdist(points, reference.points).mean(dtype=torch.float64).item()
    return 2 * across - _within(points) - reference.within


def _within(x: Tensor) -> float:
    distances = torch.cdist(x, x).fill_diagonal_(0)
    return distances.sum(dtype=torch.float64).item() / (len(x) * (len(x) - 1))


def coverage(points: Tensor, reference: Tensor, neighbors: int = 5) -> float:
    """The share of the reference [M, D] that has a point [N, D] as near as its own neighbors (arXiv 2002.09797)."""
    radius = torch.cdist(reference, reference).kthvalue(neighbors + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(reference, points).min(1).values <= radius).double().mean().item()
