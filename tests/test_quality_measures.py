"""What the comparison of methods measures beside distances: coverage, fine detail and edges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trajectory_consistency.trainer.demo.metrics import Points

sys.path.insert(0, str(Path(__file__).parent / "bench" / "quality"))

from measures import coverage, edge_strength, fine_detail


def test_coverage_is_the_share_of_a_reference_that_is_reached() -> None:
    reference = torch.cat([torch.arange(10.0), 100 + torch.arange(10.0)]).unsqueeze(1)
    assert coverage(Points(reference), Points(reference)) == 1.0
    assert coverage(Points(reference[:10]), Points(reference)) == 0.5
    assert coverage(Points(reference[:10] + 1000), Points(reference)) == 0.0


def waves(period: float) -> Tensor:
    """Two pictures [2, 3, 64, 64] of a wave across and a wave down, of a period in pixels."""
    wave = 127.5 + 100 * torch.sin(2 * torch.pi * torch.arange(64) / period)
    across = wave.expand(3, 64, 64)
    return torch.stack([across, across.mT]).round().to(torch.uint8)


@pytest.mark.parametrize(("period", "share"), [(2.5, 1.0), (64 / 17, 1.0), (64 / 15, 0.0), (32.0, 0.0)])
def test_detail_is_fine_from_half_of_the_nyquist_frequency_on(period: float, share: float) -> None:
    assert fine_detail(waves(period)) == pytest.approx(share, abs=0.01)


def test_detail_and_edges_grow_with_noise_and_shrink_with_blur() -> None:
    clean = waves(8.0)
    noisy = clean + 10 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(clean.float(), 5, stride=1, padding=2)
    assert fine_detail(noisy) > fine_detail(clean) + 0.004
    assert edge_strength(noisy) > edge_strength(clean) > edge_strength(blurred)


def test_edges_are_the_mean_difference_of_neighbors() -> None:
    ramp = (3 * torch.arange(64)).expand(1, 3, 64, 64).to(torch.uint8)
    assert edge_strength(ramp) == pytest.approx(1.5), "3 along the rows and 0 along the columns"
