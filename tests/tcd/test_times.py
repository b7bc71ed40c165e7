"""The law of the three times, by its definition."""

from typing import get_args

import pytest
import torch

from trajectory_consistency.tcd import scaled_linear_alpha_bar, timestep_grid
from trajectory_consistency.tcd.objective import Weighting, weights
from trajectory_consistency.tcd.times import Law, Times, sample_times
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.unet.network import Network

GRID = list(range(19, 1000, 20))


LAWS = get_args(Law)


def draw(law: Law, count: int = 40_000, skip: int = 20, phases: int = 4) -> Times:
    generator = torch.Generator().manual_seed(0)
    return sample_times(count, law=law, origin_steps=50, skip=skip, phases=phases, generator=generator)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("skip", [1, 20, 37, 999])
def test_s_is_never_above_t_next_which_is_below_t(law: Law, skip: int) -> None:
    t, t_next, s = draw(law, skip=skip)
    assert (s <= t_next).all() and (t_next < t).all() and (s >= 0).all()
    assert torch.equal(t_next, (t - skip).clamp(min=0))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("origin_steps", [number for number in range(1, 1001) if 1000 % number == 0])
def test_on_every_grid_t_is_above_zero_and_t_next_below_t(law: Law, origin_steps: int) -> None:
    values = {"base": {"path": "tiny"}, "data": {"folder": "."}, "output": {"folder": "out"}}
    method = {"law": law, "origin_steps": origin_steps, "phases": [1], "weighting": "gap"}
    if law == "target" and origin_steps < 8:
        with pytest.raises(UserError, match=f"origin_steps is {origin_steps}, but the law target .* use 8 or more"):
            from_mapping({**values, "method": method})
        return
    from_mapping({**values, "method": method})
    grid = timestep_grid(origin_steps, origin_steps=origin_steps)
    level = Network(None, scaled_linear_alpha_bar().float(), "eps").level  # type: ignore[arg-type]
    for skip in (1, 20, 999):
        for phases in {1, (origin_steps + 1) // 2, origin_steps}:
            generator = torch.Generator().manual_seed(skip)
            times = sample_times(
                20_000, law=law, origin_steps=origin_steps, skip=skip, phases=phases, generator=generator
            )
            assert (times.s >= 0).all() and (times.s <= times.t_next).all() and (times.t_next < times.t).all()
            assert set(times.t.tolist()) == set(grid) - {0}
            for weighting in get_args(Weighting):
                assert weights(times, level, weighting).isfinite().all()


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


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_a_segment_is_left_by_the_teachers_step_alone(segments: int) -> None:
    t, t_next, s = draw("segment", 400_000, phases=segments)
    for chosen in (19, 259, 519, 739, 999):
        start = max(edge for edge in (k * 1000 // segments for k in range(segments)) if edge <= chosen)
        after = max(chosen - 20, 0)
        low, found = min(start, after), s[t == chosen].double()
        assert low <= found.min() and found.max() <= after
        spread = (after - low + 1) / 12**0.5  # of a uniform law
        assert abs(found.mean() - (low + after) / 2) <= 5 * spread / len(found) ** 0.5
        assert abs(found.std() - spread) <= 0.05 * spread + (low == after)
    edges = torch.tensor([k * 1000 // segments for k in range(segments)])
    segment_of = lambda time: torch.bucketize(time, edges, right=True)  # noqa: E731
    inside = segment_of(t_next) == segment_of(t)
    assert (segment_of(s) == segment_of(t))[inside].all() and (s == t_next)[~inside].all()


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_a_phase_ends_where_a_sampler_of_so_many_steps_goes(phases: int) -> None:
    t, _, s = draw("phase", phases=phases)
    visited = [*timestep_grid(phases), 0]
    for here, there in zip(visited, visited[1:], strict=False):
        within = (t <= here) & (t > there)
        assert within.any() and (s[within] == there).all()


def test_targets_are_those_of_the_published_law() -> None:
    t, t_next, s = draw("target", 400_000)
    # As printed by the authors' code for 50 points of the grid.
    points = [0, 139, 159, 179, 199, 259, 299, 339, 379, 399, 439, 499]
    points += [579, 599, 639, 679, 719, 759, 799, 839, 859, 879]
    for chosen in (19, 159, 519, 999):
        highest = max(point for point in points if point <= max(chosen - 20, 0))
        allowed = [point for point in points if highest - 260 <= point <= highest]
        found = s[t == chosen].double()
        assert 0.99 * allowed[-1] - 1 <= found.max() <= allowed[-1]
        assert int(0.7 * allowed[0]) <= found.min() <= 0.75 * allowed[0]
        assert abs(found.mean() - sum(allowed) / len(allowed) * 0.85 + 0.5) <= 0.5 + 4 * found.std() / len(found) ** 0.5
    assert abs((s == 0).float().mean().item() - 0.18) < 0.01
    assert s[t >= 750].min() >= 349, "long jumps from high noise are not in it"


@pytest.mark.parametrize("law", LAWS)
def test_one_example_and_the_same_seed(law: Law) -> None:
    first, second = draw(law, 1), draw(law, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
