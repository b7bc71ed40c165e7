"""Measures of pictures and points beside the energy distance: coverage, and how much fine detail there is."""

from __future__ import annotations

import torch
from torch import Tensor

from trajectory_consistency.trainer.demo.metrics import Points


def coverage(points: Points, reference: Points) -> float:
    """Return the share of reference points with a point at least as near as their fifth neighbor (arXiv 2002.09797)."""
    radius = torch.cdist(reference.at, reference.at).kthvalue(6, dim=1).values  # the nearest is the point itself
    return (torch.cdist(reference.at, points.at).min(1).values <= radius).double().mean().item()


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
