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
        return _mean_distance(self.at, self.at, kinds[:, None] == kinds)

    def to(self, other: Points) -> float:
        """The mean distance of one of them and one of the others."""
        if self.kinds is None or other.kinds is None:
            return torch.cdist(self.at, other.at).mean(dtype=torch.float64).item()
        return _mean_distance(self.at, other.at, self.kinds[:, None] == other.kinds)

    @cached_property
    def radius(self) -> Tensor:
        """How far each is from the fifth nearest of the others, [N]."""
        return torch.cdist(self.at, self.at).kthvalue(6, dim=1).values  # the nearest is itself


def energy_distance(points: Points, reference: Points) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|; unbiased, so around 0 for equal laws."""
    return 2 * points.to(reference) - points.within - reference.within


def coverage(points: Points, reference: Points) -> float:
    """The share of the reference that has one of the points as near as its own five nearest (arXiv 2002.09797)."""
    return (torch.cdist(reference.at, points.at).min(1).values <= reference.radius).double().mean().item()


def _mean_distance(x: Tensor, y: Tensor, apart: Tensor) -> float:
    """That of points [N, D] and [M, D] but for those pairs, [N, M], that are set apart."""
    distances = torch.cdist(x, y).masked_fill_(apart, 0)
    return distances.sum(dtype=torch.float64).item() / (~apart).sum().item()
