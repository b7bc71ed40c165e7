"""What the comparison of methods measures by: distances that are 0 for equal laws, with points of kinds and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "bench" / "quality"))

from measures import Points, coverage, edge_strength, energy_distance, fine_detail

KINDS = torch.arange(200)
CENTERS = 10 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))


def drawn(seed: int, rounds: int = 1, away: float = 0.0) -> Tensor:
    """A point of each kind, which is around a center of its own, in some rounds."""
    noise = torch.randn(200 * rounds, 3, generator=torch.Generator().manual_seed(seed))
    return CENTERS.repeat(rounds, 1) + noise + away


def test_points_of_all_kinds_are_at_no_distance_from_others_and_those_that_moved_are() -> None:
    reference = Points(drawn(1, rounds=5), KINDS.repeat(5))
    same = [energy_distance(Points(drawn(seed), KINDS), reference) for seed in range(2, 12)]
    assert abs(sum(same) / len(same)) < 0.002
    assert energy_distance(Points(drawn(2, away=1.0), KINDS), reference) > 0.1


def test_kinds_that_chance_picks_are_noise_that_all_kinds_alike_are_without() -> None:
    reference = Points(drawn(1, rounds=5), KINDS.repeat(5))
    picked = [torch.randint(200, (200,), generator=torch.Generator().manual_seed(seed)) for seed in range(2, 12)]
    by_chance = [energy_distance(Points(drawn(seed)[some]), reference) for seed, some in enumerate(picked, 2)]
    alike = [energy_distance(Points(drawn(seed), KINDS), reference) for seed in range(2, 12)]
    assert torch.tensor(alike).std() < 0.2 * torch.tensor(by_chance).std()


def test_the_distance_is_that_of_its_definition() -> None:
    x, y = Points(torch.tensor([[0.0], [1.0], [3.0]])), Points(torch.tensor([[0.0], [2.0]]))
    across = (0 + 2 + 1 + 1 + 3 + 1) / 6
    assert energy_distance(x, y) == pytest.approx(2 * across - (1 + 3 + 2) / 3 - 2)


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
