"""What is measured of points against others: how far the two are apart, and how much of one is in the other."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Points:
    """Points [N, D], each of a kind [N]; without kinds, each is a kind of its own.

    Where two samples hold all kinds alike, as one picture of each caption, only points of different kinds are
    compared, so that the kinds that chance would have picked are no part of the noise.
    """

    def __init__(self, at: Tensor, kinds: Tensor | None = None) -> None:
        self.at, self.kinds = at, kinds

    @cached_property
    def within(self) -> float:
        """The mean distance of two of them."""
        kinds = torch.arange(len(self.at)) if self.kinds is None else self.kinds
        distances = torch.cdist(self.at, self.at)
        return distances[kinds[:, None] != kinds].mean(dtype=torch.float64).item()

    def to(self, other: Points) -> float:
        """The mean distance of one of them and one of the others."""
        distances = torch.cdist(self.at, other.at)
        if self.kinds is not None and other.kinds is not None:
            distances = distances[self.kinds[:, None] != other.kinds]
        return distances.mean(dtype=torch.float64).item()


def energy_distance(points: Points, reference: Points) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|; unbiased, so around 0 for equal laws."""
    return 2 * points.to(reference) - points.within - reference.within


def coverage(points: Tensor, reference: Tensor, neighbors: int = 5) -> float:
    """The share of the reference [M, D] that has a point [N, D] as near as its own neighbors (arXiv 2002.09797)."""
    radius = torch.cdist(reference, reference).kthvalue(neighbors + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(reference, points).min(1).values <= radius).double().mean().item()
