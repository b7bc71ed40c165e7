"""What the comparison of methods measures by: distances that are 0 for equal laws, with points of kinds and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "bench" / "quality"))

from measures import Points, coverage, energy_distance

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
