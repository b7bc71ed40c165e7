"""Training times on every clock: grids, points and midpoints, against the sampling side of the same schedule."""

import math

import pytest
import torch
from torch import Tensor

from ladders import CLOCKS, DISCRETE
from oracles import half_log_snr
from trajectory_consistency.tcd import (
    BridgeSchedule,
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    Schedule,
    TimePoint,
    scaled_linear_alpha_bar,
    zero_terminal_snr,
)
from trajectory_consistency.tcd.levels import HalfLogSNR

TABLES = {"discrete": scaled_linear_alpha_bar(), "zero_snr": zero_terminal_snr(scaled_linear_alpha_bar())}
TERMINAL = 4518.76
each_clock = pytest.mark.parametrize("name", CLOCKS)
each_table = pytest.mark.parametrize("name", DISCRETE)


def sampling_sigma(schedule: Schedule, point: TimePoint) -> Tensor:
    """The sigma [B] in the sampling scale of a point of whole times."""
    if isinstance(schedule, DiscreteSchedule):
        return schedule.sigma(point.time)
    alpha, sigma = (torch.as_tensor(part).flatten() for part in point.level)
    return sigma if isinstance(schedule, FlowSchedule) else sigma / alpha


def pairs(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Times t >= s: all of the grid of 50, and neighbors."""
    grid, every = schedule.grid(50), torch.arange(schedule.num_times)
    t, s = (each.flatten() for each in torch.meshgrid(grid, grid, indexing="ij"))
    t, s = t[s <= t], s[s <= t]
    return torch.cat([t, every[1:], every[2:]]), torch.cat([s, every[:-1], every[:-2]])


# The discrete clock, written out


@each_table
@pytest.mark.parametrize("ndim", [1, 4, 5])
def test_a_timestep_has_the_alpha_bar_of_the_table_to_the_last_bit(name: str, ndim: int) -> None:
    alpha_bar = TABLES[name].float()
    time = torch.tensor([999, 0, 1, 517, 998, 0])
    point = CLOCKS[name].point(time, ndim)
    alpha, sigma = point.level
    expected = alpha_bar[time].view(-1, *[1] * (ndim - 1))
    assert torch.equal(alpha, expected.sqrt()) and torch.equal(sigma, (1 - expected).sqrt())
    assert point.time is time and torch.equal(point.network_time, time)
    assert alpha.flatten()[0].item() == (0 if name == "zero_snr" else pytest.approx(0.0683, abs=1e-4))


@each_table
def test_between_timesteps_half_log_snr_is_linear_to_the_last_bit(name: str) -> None:
    alpha_bar = TABLES[name].float().clamp(min=1 / (1 + TERMINAL**2))
    log_snr = alpha_bar.logit()
    time = torch.cat([999 * torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 999.0])])
    below = time.long().clamp(max=998)
    expected = torch.lerp(log_snr[below], log_snr[below + 1], time - below).sigmoid()
    alpha, sigma = CLOCKS[name].point(time).level
    assert torch.equal(alpha, expected.sqrt()) and torch.equal(sigma, (1 - expected).sqrt())


@each_table
def test_the_midpoint_of_timesteps_is_found_by_hand_to_the_last_bit(name: str) -> None:
    log_snr = TABLES[name].float().clamp(min=1 / (1 + TERMINAL**2)).logit()
    t, s = pairs(CLOCKS[name])
    for found, start, end in zip(CLOCKS[name].midpoint(t, s)[::7], t[::7], s[::7], strict=True):
        middle = (log_snr[start] + log_snr[end]) / 2
        above = max(int((log_snr > middle).sum()), 1)
        low, high = log_snr[above - 1], log_snr[above]
        assert found == above - 1 + (middle - low) / (high - low)


def test_the_midpoint_is_half_way_in_half_log_snr_and_its_level_is_there() -> None:
    clock = CLOCKS["discrete"]
    t, s = torch.tensor([999, 519, 19, 1]), torch.tensor([0, 500, 0, 0])
    u = clock.midpoint(t, s)
    table = HalfLogSNR.of(TABLES["discrete"])
    torch.testing.assert_close(table.at(u), (table.at(t) + table.at(s)) / 2)
    above, there, below = (half_log_snr(clock.point(time).level) for time in (t, u, s))
    # 1 - alpha_bar next to the clean end has four digits in float32.
    torch.testing.assert_close(there, (above + below) / 2, rtol=1e-5, atol=1e-5)
    assert ((s < u) & (u < t)).all()
    whole = torch.tensor([0, 1, 500, 998, 999])
    for a, b in zip(clock.point(whole.double()).level, clock.point(whole).level, strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedule_of_sigmas_has_their_alpha_bar() -> None:
    sigmas = CLOCKS["discrete"].sigmas
    for dtype in (torch.float32, torch.float64):
        schedule = DiscreteSchedule(sigmas.to(dtype))
        assert schedule.alpha_bar.dtype == torch.float32
        torch.testing.assert_close(schedule.alpha_bar, (1 / (1 + sigmas**2)).float())
    terminal = DiscreteSchedule(torch.tensor([1.0, TERMINAL]))
    assert terminal.point(torch.tensor([1])).level.alpha == pytest.approx(1 / TERMINAL)


def test_a_distilled_model_has_the_levels_of_its_sigmas_at_all_timesteps() -> None:
    schedule = DiscreteSchedule(CLOCKS["discrete"].sigmas[19::20], num_timesteps=1000)
    assert schedule.num_times == 1000
    assert torch.equal(schedule.grid(50), CLOCKS["discrete"].grid(50))
    every = torch.arange(1000)
    alpha, sigma = (torch.as_tensor(part).double() for part in schedule.point(every).level)
    torch.testing.assert_close(sigma / alpha, schedule.sigma(every), rtol=1e-4, atol=0)
    t, s = pairs(schedule)
    u = schedule.midpoint(t, s)
    assert ((s <= u) & (u <= t)).all(), "below timestep 19 all levels are one"


def test_a_bridge_cannot_be_trained_on() -> None:
    bridge = BridgeSchedule(torch.tensor([1.0, 2.0]))
    for call in (bridge.point, bridge.point_at):
        with pytest.raises(ValueError, match="knows no noise: its schedule cannot be trained on"):
            call(torch.tensor([1]))


# The other clocks


def test_a_flow_has_its_shifted_time_as_level_and_as_network_time() -> None:
    time = torch.tensor([0, 1, 250, 1000])
    point = CLOCKS["flow_shifted"].point(time, 3)
    sigma = torch.tensor([0, 3 / 1002, 0.5, 1]).view(4, 1, 1)
    torch.testing.assert_close(point.level, Level(1 - sigma, sigma))
    torch.testing.assert_close(point.network_time, 1000 * sigma.flatten())
    assert point.level.sigma[0] == 0 and point.level.alpha[-1] == 0
    fraction = CLOCKS["flow"].point(torch.tensor([250.5]))
    torch.testing.assert_close(fraction.level, Level(torch.tensor([0.7495]), torch.tensor([0.2505])))
    torch.testing.assert_close(fraction.network_time, torch.tensor([250.5]))


def test_a_continuous_clock_is_variance_preserving_and_asks_for_the_network_time() -> None:
    schedule = ContinuousSchedule(80.0, lambda sigma: sigma.log() / 4)
    time = torch.tensor([0, 1, 500, 1000])
    point = schedule.point(time)
    alpha, sigma = (torch.as_tensor(part).double() for part in point.level)
    u = time / 1000 * 80 / 81
    torch.testing.assert_close(sigma / alpha, (u / (1 - u)).double(), rtol=5e-6, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(point.network_time[1:], ((sigma / alpha).log() / 4).float()[1:])
    torch.testing.assert_close(CLOCKS["edm"].point(time).network_time.double(), sigma / alpha)


def test_levels_near_clean_keep_their_sigma() -> None:
    """1 - alpha_bar in float32 would lose it."""
    sigma = torch.tensor([1e-4, 1e-3])
    torch.testing.assert_close(torch.as_tensor(CLOCKS["edm"].point_at(sigma).level.sigma), sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("origin_steps", [0, -1, 1001, 2.5])
@each_clock
def test_a_grid_that_the_clock_has_not_is_refused(name: str, origin_steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        CLOCKS[name].grid(origin_steps)
    with pytest.raises(ValueError, match="steps"):
        CLOCKS[name].sampler_times(origin_steps, 50)


@pytest.mark.parametrize("shift", [lambda u: 0 * u / (1 - u), lambda u: 1 - u])
def test_a_shift_that_gives_no_levels_is_refused_before_training(shift) -> None:
    with pytest.raises(ValueError, match="no sigmas that descend from 1 to 0"):
        FlowSchedule(shift).to("cpu")


@pytest.mark.parametrize("shift", [0.05, 12.0, 300.0])
def test_levels_beyond_a_stand_in_have_midpoints_all_the_same(shift: float) -> None:
    schedule = FlowSchedule(lambda u: shift * u / (1 + (shift - 1) * u))
    t, s = pairs(schedule)
    u = schedule.midpoint(t, s)
    assert ((s <= u) & (u <= t)).all()


# All clocks


@each_clock
def test_noise_rises_with_time_and_the_clean_end_is_zero(name: str) -> None:
    schedule = CLOCKS[name]
    every = torch.arange(schedule.num_times)
    falling = half_log_snr(schedule.point(every).level)
    assert (falling.diff() < 0).all()
    assert schedule.num_times == (1000 if name in DISCRETE else 1001)
    if name not in DISCRETE:
        assert falling[0] == math.inf


@each_clock
def test_the_levels_of_training_are_those_of_sampling_in_another_scale(name: str) -> None:
    schedule = CLOCKS[name]
    every = torch.arange(1, 999)
    point = schedule.point(every)
    sampled = schedule.level(sampling_sigma(schedule, point))
    torch.testing.assert_close(half_log_snr(point.level), half_log_snr(sampled), rtol=1e-4, atol=1e-4)


@each_clock
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 10, 50, 100, 200, 250, 500, 1000])
def test_the_levels_of_a_grid_are_those_of_a_run(name: str, steps: int) -> None:
    schedule = CLOCKS[name]
    grid = schedule.grid(steps)
    assert grid.dtype == torch.int64 and grid[0] == 0 and grid[-1] == schedule.num_times - 1
    assert (grid.diff() > 0).all()
    expected = [time for time in grid.tolist()[::-1] if time or name in DISCRETE]
    assert schedule.sampler_times(steps, steps) == expected[:steps]
    if name in DISCRETE:
        if steps % 50:
            return  # of these a run is on the grid of 50
        run = schedule.sigmas_for(steps, refine=True)[:-1].flip(0)
        times = grid[-steps:]
        assert torch.equal(schedule.sigma(times), run)
    else:
        run = schedule.sigmas_for(steps).flip(0)
        found = sampling_sigma(schedule, schedule.point(grid))
        torch.testing.assert_close(found, run, rtol=5e-6, atol=0)
        assert found[0] == 0


@each_clock
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 50])
def test_the_times_visited_are_those_of_a_sampler(name: str, steps: int) -> None:
    schedule = CLOCKS[name]
    visited = schedule.sampler_times(steps, 50)
    assert schedule.point_at(schedule.sigmas_for(steps)[:-1]).time.tolist() == visited


@each_clock
def test_a_point_is_found_again_by_its_sigma(name: str) -> None:
    schedule = CLOCKS[name]
    point = schedule.point(torch.arange(schedule.num_times), 4)
    again = schedule.point_at(sampling_sigma(schedule, point), 4)
    assert torch.equal(again.time, point.time)
    for found, expected in zip(again.level, point.level, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again.network_time, point.network_time)


def test_between_two_times_a_sigma_is_kept_where_the_network_knows_it() -> None:
    sigma = torch.tensor([0.2504, 0.7777], dtype=torch.float64)
    flow = CLOCKS["flow"].point_at(sigma)
    assert flow.time.tolist() == [250, 778]
    assert torch.equal(torch.as_tensor(flow.level.sigma), sigma) and torch.equal(flow.network_time, 1000 * sigma)
    edm = CLOCKS["edm"].point_at(sigma)
    assert torch.equal(edm.network_time, sigma)
    torch.testing.assert_close(half_log_snr(edm.level), -sigma.log())
    discrete = CLOCKS["discrete"].point_at(sigma)
    assert torch.equal(discrete.network_time, discrete.time)


@each_clock
def test_the_midpoint_is_half_way_in_half_log_snr(name: str) -> None:
    schedule = CLOCKS[name]
    t, s = pairs(schedule)
    u = schedule.midpoint(t, s)
    assert u.is_floating_point() and ((s <= u) & (u <= t)).all() and ((s < u) & (u < t))[s < t].all()
    limit = math.log(TERMINAL)
    at_t, at_s, at_u, above, below = (
        half_log_snr(schedule.point(time).level).clamp(-limit, limit)
        for time in (t, s, u, u.floor().long(), u.ceil().long())
    )
    middle = (at_t + at_s) / 2
    # Between two whole times it is taken for linear, which it is not next to an end without noise or signal.
    close = (u >= 20) & (u <= schedule.num_times - 20)
    assert close.sum() > 1000
    torch.testing.assert_close(at_u[close], middle[close], rtol=0, atol=1e-3)
    assert ((above >= middle - 1e-3) & (middle >= below - 1e-3)).all()


@each_clock
def test_the_midpoint_is_found_between_the_levels_of_whole_times(name: str) -> None:
    """In float64, from the levels themselves: next to the clean end float32 must not have lost them."""
    schedule = CLOCKS[name]
    limit = math.log(TERMINAL)
    table = half_log_snr(schedule.point(torch.arange(schedule.num_times)).level).clamp(-limit, limit)
    t = torch.cat([torch.arange(2, schedule.num_times), torch.arange(2, 50)])
    s = torch.cat([torch.arange(schedule.num_times - 2), torch.zeros(48, dtype=torch.int64)])
    middle = (table[t] + table[s]) / 2
    below = (table >= middle[:, None]).sum(1) - 1
    expected = below + (table[below] - middle) / (table[below] - table[below + 1])
    torch.testing.assert_close(schedule.midpoint(t, s).double(), expected, rtol=0, atol=2e-3)


@each_clock
def test_times_may_be_fractions(name: str) -> None:
    schedule = CLOCKS[name]
    t, s = pairs(schedule)
    assert torch.equal(schedule.midpoint(t.float(), s.float()), schedule.midpoint(t, s))
    u = schedule.midpoint(t, s)
    quarter = schedule.midpoint(u, s)
    assert ((s <= quarter) & (quarter <= u)).all()
    every = torch.arange(schedule.num_times - 1)
    whole, fraction = schedule.point(every), schedule.point(every.float())
    for a, b in zip(whole.level, fraction.level, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fraction.network_time, whole.network_time.float())
    between = half_log_snr(schedule.point(every + 0.5).level)
    assert (between < half_log_snr(whole.level)).all()


@each_clock
@pytest.mark.parametrize("count", [1, 6])
def test_rows_are_those_of_their_times(name: str, count: int) -> None:
    time = torch.tensor([999, 1, 500, 20, 700, 0])[:count]
    whole = CLOCKS[name].point(time, 4)
    for index in (torch.tensor([count - 1, 0]), slice(0, count - 1)):
        rows, expected = whole.rows(index), CLOCKS[name].point(time[index], 4)
        assert torch.equal(rows.time, expected.time) and torch.equal(rows.network_time, expected.network_time)
        for a, b in zip(rows.level, expected.level, strict=True):
            assert a.shape == b.shape == (len(time[index]), 1, 1, 1)
            assert torch.equal(a, b)


@each_clock
def test_points_and_midpoints_never_look_at_a_number(name: str) -> None:
    """On the meta device there is none: what would wait for a GPU fails there."""
    schedule = CLOCKS[name]
    moved = schedule.to("meta")
    t, s = torch.empty(3, dtype=torch.int64, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    u = moved.midpoint(t, s)
    assert u.shape == (3,) and moved.midpoint(u, s).device.type == "meta"
    for time in (t, u):
        point = moved.point(time, 4)
        assert {part.device.type for part in (*point.level, point.network_time)} == {"meta"}
        assert [part.shape for part in point.level] == [(3, 1, 1, 1)] * 2
        assert point.rows(torch.empty(2, dtype=torch.int64, device="meta")).network_time.shape == (2,)
    # What was moved still samples, and what was not moved has kept its tables.
    assert torch.equal(moved.sigmas_for(4), schedule.sigmas_for(4)) and torch.equal(moved.grid(50), schedule.grid(50))
    assert schedule.point(torch.tensor([500])).network_time.device.type == "cpu"
    assert type(moved) is type(schedule)
