"""Measures of a sample of points against reference points: energy distance and coverage."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Points:
    """Points [N, D], each of a kind [N]; without kinds, each point is its own kind.

    If two samples contain every kind equally often, such as one picture for each caption, only points of different
    kinds are compared. This removes the noise that a random choice of kinds would add.
    """

    def __init__(self, at: Tensor, kinds: Tensor | None = None) -> None:
        self.at, self.kinds = at, kinds

    @cached_property
    def within(self) -> float:
        """The mean distance between two different points."""
        kinds = torch.arange(len(self.at)) if self.kinds is None else self.kinds
        return _mean_distance(self.at, self.at, kinds[:, None] == kinds)

    def to(self, other: Points) -> float:
        """Return the mean distance between a point of this sample and a point of the other."""
        if self.kinds is None or other.kinds is None:
            return torch.cdist(self.at, other.at).mean(dtype=torch.float64).item()
        return _mean_distance(self.at, other.at, self.kinds[:, None] == other.kinds)

    @cached_property
    def radius(self) -> Tensor:
        """The distance of each point to its fifth nearest neighbor, [N]."""
        return torch.cdist(self.at, self.at).kthvalue(6, dim=1).values  # the nearest is itself


def energy_distance(points: Points, reference: Points) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|; unbiased, so around 0 for equal distributions."""
    return 2 * points.to(reference) - points.within - reference.within


def coverage(points: Points, reference: Points) -> float:
    """Return the share of reference points with a point at least as near as their fifth neighbor (arXiv 2002.09797)."""
    return (torch.cdist(reference.at, points.at).min(1).values <= reference.radius).double().mean().item()


def _mean_distance(x: Tensor, y: Tensor, apart: Tensor) -> float:
    """Return the mean distance between points [N, D] and [M, D], without the pairs [N, M] that are set in `apart`."""
    distances = torch.cdist(x, y).masked_fill_(apart, 0)
    return distances.sum(dtype=torch.float64).item() / (~apart).sum().item()


def fine_detail(pictures: Tensor) -> float:
    """Return the share of power, without the mean, above half of the Nyquist frequency, of pictures [N, 3, H, W]."""
    brightness = pictures.double().mean(1)
    power = torch.fft.fft2(brightness - brightness.mean((1, 2), keepdim=True)).abs().square()
    vertical, horizontal = (torch.fft.fftfreq(size).abs() for size in brightness.shape[1:])
    is_fine = torch.maximum(vertical[:, None], horizontal) > 0.25  # in periods per pixel, of which Nyquist's is 0.5
    return (power[:, is_fine].sum() / power.sum()).item()


def edge_strength(pictures: Tensor) -> float:
    """Return the mean absolute difference between neighboring pixels, in 0 .. 255, of pictures [N, 3, H, W]."""
    signal = pictures.double()
    return ((signal.diff(dim=2).abs().mean() + signal.diff(dim=3).abs().mean()) / 2).item()
