"""What is measured of points against others: how far the two are apart, and how much of one is in the other."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(points: Tensor, reference: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of points [N, D] and [M, D]; unbiased, so around 0 for equal laws."""
    return 2 * _distances(points, reference).mean(dtype=torch.float64).item() - _within(points) - _within(reference)


def _within(x: Tensor) -> float:
    return _distances(x, x).sum(dtype=torch.float64).item() / (len(x) * (len(x) - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by a product of matrices, which rounds small distances away.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def coverage(points: Tensor, reference: Tensor, neighbors: int = 5) -> float:
    """The share of the reference [M, D] that has a point [N, D] as near as its own neighbors (arXiv 2002.09797)."""
    radius = _distances(reference, reference).kthvalue(neighbors + 1, dim=1).values  # the nearest is itself
    return (_distances(reference, points).min(1).values <= radius).double().mean().item()
