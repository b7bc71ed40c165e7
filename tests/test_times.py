"""The law of the three times, by its definition."""

import pytest
import torch

from trainer.times import Law, Times, sample_times

GRID = list(range(19, 1000, 20))


def draw(law: Law, count: int = 40_000, skip: int = 20) -> Times:
    return sample_times(count, law=law, origin_steps=50, skip=skip, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("law", ["uniform", "zero"])
@pytest.mark.parametrize("skip", [1, 20, 37, 999])
def test_s_is_never_above_t_next_which_is_below_t(law: Law, skip: int) -> None:
    t, t_next, s = draw(law, skip=skip)
    assert (s <= t_next).all() and (t_next < t).all() and (s >= 0).all()
    assert torch.equal(t_next, (t - skip).clamp(min=0))


def test_t_is_uniform_on_the_grid() -> None:
    counts = torch.bincount(draw("uniform").t, minlength=1000)
    assert counts.nonzero().flatten().tolist() == GRID
    assert (counts[GRID] / 40_000 - 1 / 50).abs().max() < 0.005


def test_s_is_uniform_over_zero_and_the_grid_up_to_t_next() -> None:
    t, _, s = draw("uniform", 400_000)
    for chosen in (19, 39, 119, 999):
        values, counts = s[t == chosen].unique(return_counts=True)
        expected = [0, *(point for point in GRID if point <= chosen - 20)]
        assert values.tolist() == expected
        assert (counts / counts.sum() - 1 / len(expected)).abs().max() < 0.03


def test_s_reaches_t_next_as_often_as_the_harmonic_number_says() -> None:
    _, t_next, s = draw("uniform", 200_000)
    assert abs((s == t_next).float().mean().item() - sum(1 / k for k in range(1, 51)) / 50) < 0.004


def test_the_law_zero_is_zero() -> None:
    assert (draw("zero").s == 0).all()


def test_one_example_and_the_same_seed() -> None:
    first, second = draw("uniform", 1), draw("uniform", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
