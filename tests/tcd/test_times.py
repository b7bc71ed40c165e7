"""The law of the three times, by its definition."""

from typing import get_args

import pytest
import torch
from einops import rearrange
from torch import Tensor

from ladders import CLOCKS, DISCRETE
from oracles import points_of
from trajectory_consistency.tcd import DiscreteSchedule, timestep_grid
from trajectory_consistency.tcd.objective import Weighting, loss_weights
from trajectory_consistency.tcd.times import Law, Times, sample_times, share_out
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.errors import UserError

GRID = list(range(19, 1000, 20))
DIVISORS = [number for number in range(1, 1001) if 1000 % number == 0]

LAWS = get_args(Law)
each_law = pytest.mark.parametrize("law", LAWS)
each_clock = pytest.mark.parametrize("clock", CLOCKS)


def draw(law: Law, count: int = 40_000, skip: int = 20, phases: int = 4, clock: str = "discrete") -> Times:
    generator = torch.Generator().manual_seed(0)
    return sample_times(
        count, schedule=CLOCKS[clock], law=law, origin_steps=50, skip=skip, phases=phases, generator=generator
    )


# On any clock


@each_clock
@each_law
@pytest.mark.parametrize("skip", [1, 20, 37, 999])
def test_s_is_never_above_t_next_which_is_below_t(law: Law, skip: int, clock: str) -> None:
    t, t_next, s = draw(law, skip=skip, clock=clock)
    assert (s <= t_next).all() and (t_next < t).all() and (s >= 0).all()
    assert torch.equal(t_next, (t - skip).clamp(min=0))
    assert {time.dtype for time in (t, t_next, s)} == {torch.int64}


@each_law
@pytest.mark.parametrize("origin_steps", DIVISORS)
def test_the_law_target_alone_needs_a_grid_of_8(law: Law, origin_steps: int) -> None:
    values = {"base": {"path": "tiny"}, "data": {"folder": "."}, "output": {"folder": "out"}}
    method = {
        "law": law,
        "origin_steps": origin_steps,
        "phases": [1],
        "weighting": "gap",
        "diagonal": 0.0,
        "to_clean": 0.0,
    }
    if law == "target" and origin_steps < 8:
        with pytest.raises(UserError, match=f"origin_steps is {origin_steps}, but the law target .* use 8 or more"):
            from_mapping({**values, "method": method})
        with pytest.raises(ValueError, match="steps is"):
            sample_times(
                4,
                schedule=CLOCKS["discrete"],
                law=law,
                origin_steps=origin_steps,
                skip=20,
                generator=torch.Generator(),
            )
        return
    from_mapping({**values, "method": method})


@each_clock
@each_law
@pytest.mark.parametrize("origin_steps", DIVISORS)
def test_on_every_grid_t_is_above_zero_and_t_next_below_t(law: Law, origin_steps: int, clock: str) -> None:
    schedule = CLOCKS[clock]
    if law == "target" and origin_steps < 8:
        return
    count = 20_000 if clock == "discrete" else max(20 * origin_steps, 100)
    grid = [1000 * k // origin_steps - (clock in DISCRETE) for k in range(1, origin_steps + 1)]
    for skip in (1, 20, 999):
        for phases in {1, (origin_steps + 1) // 2, origin_steps}:
            generator = torch.Generator().manual_seed(skip)
            times = sample_times(
                count,
                schedule=schedule,
                law=law,
                origin_steps=origin_steps,
                skip=skip,
                phases=phases,
                generator=generator,
            )
            assert (times.s >= 0).all() and (times.s <= times.t_next).all() and (times.t_next < times.t).all()
            assert set(times.t.tolist()) == set(grid) - {0}
            points = points_of(schedule, times)
            for weighting in get_args(Weighting):
                weight = loss_weights(points, weighting)
                assert weight.isfinite().all() and (weight > 0).all() and weight.shape == (count,)


@each_clock
@pytest.mark.parametrize("phases", [1, 2, 4, 8, 50])
def test_a_phase_ends_where_the_run_of_the_schedule_does(phases: int, clock: str) -> None:
    """By the sigmas of a run, not by its times."""
    schedule = CLOCKS[clock]
    t, t_next, s = draw("phase", phases=phases, clock=clock)
    edges = schedule.point_at(schedule.sigmas_for(phases)[:-1]).time
    below = torch.where(edges < t[:, None], edges, 0).amax(1)
    assert torch.equal(s, torch.minimum(below, t_next))


@each_clock
def test_targets_are_of_the_runs_of_4_to_8_steps_but_for_the_top(clock: str) -> None:
    schedule = CLOCKS[clock]
    runs = {time for steps in range(4, 9) for time in schedule.sampler_times(steps, 50)} - {schedule.num_times - 1}
    t, t_next, s = draw("target", 100_000, clock=clock)
    for chosen in schedule.grid(50)[[1, 10, 30, 50]].tolist():
        highest = max(time for time in (0, *runs) if time <= max(chosen - 20, 0))
        allowed = [time for time in (0, *runs) if highest - 260 <= time <= highest]
        found = s[t == chosen].double()
        assert 0.99 * max(allowed) - 1 <= found.max() <= max(allowed)
        assert int(0.7 * min(allowed)) <= found.min() <= 0.75 * min(allowed)
        assert abs(found.mean() - sum(allowed) / len(allowed) * 0.85 + 0.5) <= 0.5 + 4 * found.std() / len(found) ** 0.5


def test_segments_divide_the_times_that_a_clock_has() -> None:
    schedule = DiscreteSchedule(torch.linspace(0.1, 10, 250))
    generator = torch.Generator().manual_seed(0)
    t, t_next, s = sample_times(
        4000, schedule=schedule, law="segment", origin_steps=50, skip=5, phases=2, generator=generator
    )
    assert t.max() == 249
    above = t_next >= 125
    assert s[above].min() == 125 and (s[~above & (t < 125)] < 125).all()
    assert torch.equal(s[(t >= 125) & ~above], t_next[(t >= 125) & ~above])


@each_clock
@each_law
def test_the_rows_that_moved_are_those_with_a_jump_of_the_target(law: Law, clock: str) -> None:
    for count, skip in ((64, 20), (64, 999), (1, 20)):
        times = draw(law, count, skip=skip, clock=clock)
        assert times.target_rows.dtype == torch.int64
        assert times.target_rows.tolist() == [row for row in range(count) if times.s[row] < times.t_next[row]]


@each_clock
def test_rows_of_three_points_are_those_of_their_times(clock: str) -> None:
    times = draw("uniform", 6, clock=clock)
    points, index = points_of(CLOCKS[clock], times), torch.tensor([5, 0, 3])
    for point, time in zip(points.rows(index), times, strict=True):
        assert torch.equal(point.time, time[index]) and point.level.alpha.shape == (3, 1, 1, 1)


# The law, drawn by hand


def by_hand(count: int, law: Law, origin_steps: int, skip: int, phases: int) -> list[tuple[int, int, int]]:
    """Draw with the same random numbers on 1000 timesteps, one example after another, as each paper says."""
    source = torch.Generator().manual_seed(7)
    grid = [1000 // origin_steps * k - 1 for k in range(1, origin_steps + 1)]
    drawn = [time for time in grid if time > 0]
    t = [drawn[i] for i in (torch.randint(1, len(drawn) + 1, (count,), generator=source) - 1).tolist()]
    t_next = [max(time - skip, 0) for time in t]

    def pick(among: list[int], part: Tensor) -> int:
        return among[int(part * len(among))]

    def run(steps: int) -> list[int]:
        return [grid[origin_steps - 1 - i * origin_steps // steps] for i in range(steps)]

    if law == "zero":
        s = [0] * count
    elif law == "uniform":
        parts = torch.rand(count, generator=source)
        s = [pick(sorted({0, *(p for p in grid if p <= high)}), u) for high, u in zip(t_next, parts, strict=True)]
    elif law == "segment":
        parts, s = torch.rand(count, generator=source), []
        for time, high, part in zip(t, t_next, parts, strict=True):
            start = max(k * 1000 // phases for k in range(phases) if k * 1000 // phases <= time)
            s.append(pick(list(range(min(start, high), high + 1)), part))
    elif law == "phase":
        s = [max(edge for edge in (0, *run(phases)) if edge < time) for time in t]
    else:
        runs = sorted({0, *(time for steps in (4, 5, 6, 7, 8) for time in run(steps))} - {999})
        parts, falls = torch.rand(count, generator=source), torch.rand(count, generator=source)
        s = []
        for high, part, fall in zip(t_next, parts, falls, strict=True):
            highest = max(time for time in runs if time <= high)
            chosen = pick([time for time in runs if highest - 260 <= time <= highest], part)
            s.append(int((1 - 0.3 * fall) * chosen))
    return [(a, b, min(c, b)) for a, b, c in zip(t, t_next, s, strict=True)]


@each_law
@pytest.mark.parametrize(
    ("origin_steps", "skip", "phases"), [(50, 20, 4), (50, 37, 3), (8, 999, 8), (1000, 1, 7), (200, 20, 1)]
)
def test_on_timesteps_the_numbers_are_those_drawn_by_hand(law: Law, origin_steps: int, skip: int, phases: int) -> None:
    for clock in DISCRETE:
        generator = torch.Generator().manual_seed(7)
        times = sample_times(
            2000,
            schedule=CLOCKS[clock],
            law=law,
            origin_steps=origin_steps,
            skip=skip,
            phases=phases,
            generator=generator,
        )
        found = list(zip(*(time.tolist() for time in times), strict=True))
        assert found == by_hand(2000, law, origin_steps, skip, phases)


# Each law on 1000 timesteps, as its paper has it


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


@each_clock
@each_law
def test_one_example_and_the_same_seed(law: Law, clock: str) -> None:
    first, second = draw(law, 1, clock=clock), draw(law, 1, clock=clock)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The shares of a batch


def marked(batch: int) -> Times:
    """Times of which no s is t_next or 0, and no t the highest, so that every group can be told apart."""
    t = torch.arange(100, 100 + batch)
    return Times(t, t - 20, t - 50)


def shared(times: Times, first: int, diagonal: float, to_clean: float, highest: int = 999) -> Times:
    return share_out(times, first, diagonal=diagonal, to_clean=to_clean, highest=highest, skip=20)


def groups_of(drawn: Times, found: Times) -> Tensor:
    """Whether each example is on the diagonal, goes to 0 from its t, to 0 from the highest, or is as it was: [4, B]."""
    to_clean, as_before = found.s == 0, found.t == drawn.t
    one_step = to_clean & (found.t == 999) & (found.t_next == 979)
    return torch.stack(
        [as_before & (found.s == found.t_next), to_clean & as_before, one_step, as_before & (found.s == drawn.s)]
    )


SHARES = [(0, 0), (0.5, 0.15), (0.5, 0.5), (1, 0), (0, 1), (0.25, 0), (0, 0.3)]


@pytest.mark.parametrize(("diagonal", "to_clean"), SHARES)
@pytest.mark.parametrize("batch", [1, 2, 8, 17, 32])
def test_each_group_has_its_share_of_every_step_and_of_the_run(diagonal: float, to_clean: float, batch: int) -> None:
    shares, near = torch.tensor([diagonal, to_clean / 2, to_clean / 2, 1 - diagonal - to_clean]), torch.tensor(2.0)
    total = torch.zeros(4)
    for step in range(50):
        times = marked(batch)
        groups = groups_of(times, shared(times, step * batch, diagonal, to_clean))
        assert (groups.sum(0) == 1).all()
        counts = groups.sum(1)
        assert ((counts - batch * shares).abs() <= near).all()
        total += counts
        reached = (step + 1) * batch * shares
        assert ((total - reached).abs() <= near).all(), "over many steps the shares are exact, even with batch 1"


def test_the_groups_lie_evenly_in_a_batch() -> None:
    times = marked(64)
    groups = groups_of(times, shared(times, 0, diagonal=0.5, to_clean=0.25))
    assert rearrange(groups, "g (parts b) -> g parts b", b=8).sum(2).T.tolist() == 8 * [[4, 1, 1, 2]]


@each_clock
@each_law
def test_without_shares_nothing_is_changed_and_with_them_the_rest_is_as_drawn(law: Law, clock: str) -> None:
    times, highest = draw(law, count=1000, clock=clock), int(CLOCKS[clock].grid(50)[-1])
    assert all(map(torch.equal, times, shared(times, 0, 0, 0, highest)))
    changed = shared(times, 0, 0.5, 0.15, highest)
    t, t_next, s = changed
    assert ((s <= t_next) & (t_next < t)).all() and torch.equal(t_next, (t - 20).clamp(min=0))
    assert (s == t_next).sum() >= 500 and ((s == 0) & (t == highest)).sum() >= 75 and (s == 0).sum() >= 150
    kept = (t == times.t) & ((s == times.s) | (s == t_next) | (s == 0))
    assert (kept | ((t == highest) & (s == 0))).all()


def test_a_teachers_step_longer_than_the_clock_ends_at_zero() -> None:
    times = share_out(marked(8), 0, diagonal=0, to_clean=1, highest=999, skip=5000)
    assert times.t_next.min() == 0 and (times.s <= times.t_next).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"diagonal": 0.7, "to_clean": 0.4}, "diagonal is 0.7 and method.to_clean 0.4, together above 1"),
        ({"law": "zero", "diagonal": 0.5}, "the law zero has one target time for each t"),
        ({"law": "phase", "phases": [4], "to_clean": 0.5}, "the law phase has one target time for each t"),
        ({"diagonal": 1.5}, "diagonal"),
    ],
)
def test_shares_that_cannot_be_had_are_refused(method: dict[str, object], message: str) -> None:
    values = {"base": {"path": "tiny"}, "data": {"folder": "."}, "output": {"folder": "out"}}
    with pytest.raises(UserError, match=message):
        from_mapping({**values, "method": method})
