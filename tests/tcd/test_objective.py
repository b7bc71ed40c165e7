"""The loss against networks whose answers are known, on every clock, and against the paper's form, written out."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from ladders import CLOCKS
from oracles import MEAN, STD, gaussian_map, in_float64, points_of, target_time_network
from trajectory_consistency.tcd import Level, Schedule, TimePoint, add_noise, jump
from trajectory_consistency.tcd.objective import (
    DistanceName,
    Predict,
    Weighting,
    distance_of,
    first_order,
    loss_weights,
    second_order,
    tcd_loss,
)
from trajectory_consistency.tcd.times import Law, Points, Times, sample_times, share_out

each_clock = pytest.mark.parametrize("clock", CLOCKS)
each_law = pytest.mark.parametrize("law", get_args(Law))


def gaussian_x0(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
    """E[x0 | x_t] for data N(0, 0.5^2): what a perfect network predicts."""
    alpha, sigma = t.level
    return 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x_t


def batch(
    count: int = 8,
    seed: int = 0,
    clock: str = "discrete",
    law: Law = "uniform",
    diagonal: float = 0.0,
    to_clean: float = 0.0,
) -> tuple[Tensor, Tensor, Points, Tensor]:
    """x0, eps, points with levels in float64, and the rows with s < t_next."""
    generator = torch.Generator().manual_seed(seed)
    x0 = 0.5 * torch.randn(count, 4, 8, 8, generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    times = sample_times(
        count, schedule=CLOCKS[clock], law=law, origin_steps=50, skip=20, phases=4, generator=generator
    )
    highest = int(CLOCKS[clock].grid(50)[-1])
    times = share_out(times, 0, diagonal=diagonal, to_clean=to_clean, highest=highest, skip=20)
    return x0, eps, exact_points(CLOCKS[clock], times), times.target_rows


def exact_points(schedule: Schedule, times: Times) -> Points:
    return Points(*map(in_float64, points_of(schedule, times)))


def target_rows_of(points: Points) -> Tensor:
    return Times(*(point.time for point in points)).target_rows


def knows(x0: Tensor) -> Predict:
    """A network that knows the clean latents."""
    return lambda x_t, t, s: x0


def halfway(clock: str) -> Callable[[TimePoint, TimePoint], TimePoint]:
    """The midpoint of two points, with levels in float64."""
    schedule = CLOCKS[clock]
    return lambda t, s: in_float64(schedule.point(schedule.midpoint(t.time, s.time), 4))


def loss(student: Predict, teacher: Predict, x0: Tensor, eps: Tensor, points: Points, c: float = 0.001) -> Tensor:
    """TCD's own: first order, the student itself as target, Huber of each element, every example alike."""
    follow, distance = first_order(student), distance_of("huber", c)
    return tcd_loss(
        follow, follow, teacher, x0, eps, points, target_rows=target_rows_of(points), distance=distance
    ).mean()


def exponential_integrator(x: Tensor, x0: Tensor, t: Level, s: Level) -> Tensor:
    """TCF(1) as the paper prints it."""
    h = (s.alpha / s.sigma).log() - (t.alpha / t.sigma).log()
    return s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * x0


def test_it_is_the_papers_loss_written_out() -> None:
    x0, eps, points, _ = batch()
    t, t_next, s = (point.level for point in points)

    def student(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        return 0.3 * x_t + t.time.view(-1, 1, 1, 1) / 1000 + s.time.view(-1, 1, 1, 1) / 500

    x_t = add_noise(x0, eps, t)
    x_next = exponential_integrator(x_t, gaussian_x0(x_t, points.t, points.t_next), t, t_next)
    target = exponential_integrator(x_next, student(x_next, points.t_next, points.s), t_next, s)
    pred = exponential_integrator(x_t, student(x_t, points.t, points.s), t, s)
    expected = ((pred - target) ** 2 + 0.01**2).sqrt().mean() - 0.01
    torch.testing.assert_close(loss(student, gaussian_x0, x0, eps, points, c=0.01), expected)


# Networks without loss


@each_clock
@each_law
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("count", [1, 32])
def test_a_network_that_knows_the_point_has_no_loss(law: Law, order: int, count: int, clock: str) -> None:
    x0, eps, points, target_rows = batch(count, clock=clock, law=law)
    follow, target = (
        first_order(knows(each)) if order == 1 else second_order(knows(each), halfway(clock))
        for each in (x0, x0[target_rows])
    )
    for name in get_args(DistanceName):
        found = tcd_loss(
            follow, target, knows(x0), x0, eps, points, target_rows=target_rows, distance=distance_of(name, 0.001)
        )
        for weighting in get_args(Weighting):
            weighted = loss_weights(points, weighting) * found
            assert weighted.shape == (count,) and (weighted.abs() < 1e-12).all()


@each_clock
@each_law
@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize(("diagonal", "to_clean"), [(0, 0), (0.5, 0.15), (1, 0), (0, 1)])
def test_a_network_that_knows_s_can_have_no_loss_at_all(
    law: Law, count: int, clock: str, diagonal: float, to_clean: float
) -> None:
    """On a Gaussian: its exact trajectories are jumps of a network that is given s, and of none that is not."""
    x0, eps, points, target_rows = batch(count, clock=clock, law=law, diagonal=diagonal, to_clean=to_clean)
    assert len(target_rows) < count or diagonal < 1
    follow = first_order(target_time_network)
    for name in get_args(DistanceName):
        distance = distance_of(name, 0.001)
        found = tcd_loss(
            follow, follow, target_time_network, x0, eps, points, target_rows=target_rows, distance=distance
        )
        for weighting in get_args(Weighting):
            assert ((loss_weights(points, weighting) * found).abs() < 1e-12).all()


@each_clock
def test_a_network_that_goes_elsewhere_or_ignores_s_has_a_loss(clock: str) -> None:
    x0, eps, points, _ = batch(32, clock=clock)
    schedule = CLOCKS[clock]
    assert loss(target_time_network, target_time_network, x0, eps, points) < 1e-12

    def elsewhere(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        return target_time_network(x_t, t, in_float64(schedule.point(s.time // 2, 4)))

    def ignorant(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        alpha, sigma = t.level
        return MEAN + STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * (x_t - alpha * MEAN)

    assert loss(elsewhere, target_time_network, x0, eps, points) > 1e-3
    assert loss(ignorant, target_time_network, x0, eps, points) > 1e-3


@each_clock
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jump_through_a_point_between_is_the_jump(dtype: torch.dtype, clock: str) -> None:
    schedule = CLOCKS[clock]
    top = schedule.num_times - 1
    times = Times(
        torch.tensor([top, top, 500, 40, 2]), torch.tensor([980, 500, 499, 20, 1]), torch.tensor([0, 1, 2, 0, 0])
    )
    points = points_of(schedule, times) if dtype == torch.float32 else exact_points(schedule, times)
    x, x0 = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    t, u, s = (point.level for point in points)
    through = jump(jump(x, x0, t, u), x0, u, s)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(through, jump(x, x0, t, s), rtol=tolerance, atol=tolerance)
    assert torch.equal(jump(x, x0, t, t), x)


@each_clock
def test_arithmetic_is_in_float32_whatever_the_network_answers_in(clock: str) -> None:
    schedule = CLOCKS[clock]
    times = sample_times(
        1, schedule=schedule, law="zero", origin_steps=50, skip=20, generator=torch.Generator().manual_seed(0)
    )
    x0 = torch.full((1, 4, 8, 8), 0.75)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    follow = first_order(knows(x0.bfloat16()))
    found = tcd_loss(
        follow,
        follow,
        knows(x0.bfloat16()),
        x0,
        eps,
        points_of(schedule, times),
        target_rows=times.target_rows,
        distance=distance_of("l2", 0.0),
    )
    assert found.dtype == torch.float32 and (found < 1e-12).all()


# Who is called with what


@each_clock
def test_the_order_of_the_batch_does_not_matter(clock: str) -> None:
    x0, eps, points, _ = batch(clock=clock)
    flip = torch.arange(7, -1, -1)
    torch.testing.assert_close(
        loss(gaussian_x0, gaussian_x0, x0[flip], eps[flip], points.rows(flip)),
        loss(gaussian_x0, gaussian_x0, x0, eps, points),
    )


@each_clock
def test_only_the_prediction_has_a_gradient_and_the_student_comes_last(clock: str) -> None:
    x0, eps, points, target_rows = batch(64, clock=clock)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls: list[tuple[str, bool, list[int], list[int]]] = []

    def called(who: str, t: TimePoint, s: TimePoint) -> None:
        calls.append((who, torch.is_grad_enabled(), t.time.tolist(), s.time.tolist()))

    def student(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        called("student", t, s)
        return weight * gaussian_x0(x_t, t, s)

    def teacher(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        called("teacher", t, s)
        return gaussian_x0(x_t, t, s)

    loss(student, teacher, x0, eps, points).backward()
    assert 0 < len(target_rows) < 64, "the batch must have rows with s = t_next and others"
    t, t_next, s = (point.time for point in points)
    assert calls == [
        ("teacher", False, t.tolist(), t_next.tolist()),
        ("student", False, t_next[target_rows].tolist(), s[target_rows].tolist()),
        ("student", True, t.tolist(), s.tolist()),
    ]
    assert weight.grad is not None and weight.grad != 0


@each_clock
@pytest.mark.parametrize("count", [1, 3])
def test_where_s_is_t_next_the_target_is_the_teachers_step(count: int, clock: str) -> None:
    x0, eps, _, _ = batch(count)
    times = Times(*(torch.full((count,), time) for time in (519, 499, 499)))
    points = exact_points(CLOCKS[clock], times)
    assert times.target_rows.shape == (0,)

    def never_for_the_target(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        assert torch.is_grad_enabled(), "the target needs no forward here"
        return gaussian_x0(x_t, t, s)

    assert loss(never_for_the_target, gaussian_x0, x0, eps, points) < 1e-12


@each_clock
def test_the_rows_left_out_of_the_target_would_not_have_moved(clock: str) -> None:
    x0, eps, points, target_rows = batch(64, clock=clock)
    follow = first_order(gaussian_x0)
    alone, all_rows = (
        tcd_loss(follow, follow, gaussian_x0, x0, eps, points, target_rows=rows, distance=distance_of("l2", 0.0))
        for rows in (target_rows, torch.arange(64))
    )
    assert len(target_rows) < 64 and torch.equal(alone, all_rows)


def test_the_target_may_be_another_network_than_the_student() -> None:
    x0, eps, points, _ = batch()
    clean = torch.zeros_like(points.s.time)
    points = points._replace(s=in_float64(CLOCKS["discrete"].point(clean, 4)))
    target_rows, distance = target_rows_of(points), distance_of("l2", 0.0)
    student, teacher = first_order(knows(x0)), knows(x0)
    right, wrong = (first_order(knows(x0[target_rows] + error)) for error in (0, 1))
    kept = (points.s.level.sigma / points.t.level.sigma).flatten()
    assert (
        tcd_loss(student, right, teacher, x0, eps, points, target_rows=target_rows, distance=distance) < 1e-12
    ).all()
    off = tcd_loss(student, wrong, teacher, x0, eps, points, target_rows=target_rows, distance=distance)
    assert (off[target_rows] > 0.9 * (1 - kept[target_rows]) ** 2).all()


@each_clock
@pytest.mark.parametrize("order", [1, 2])
def test_the_loss_never_looks_at_a_number(order: int, clock: str) -> None:
    """On the meta device there is none: what would wait for a GPU fails there."""
    schedule = CLOCKS[clock].to("meta")
    time = torch.empty(4, dtype=torch.int64, device="meta")
    points = points_of(schedule, Times(time, time, time))
    x0 = torch.empty(4, 4, 8, 8, device="meta")
    follow = first_order(gaussian_x0)
    if order == 2:
        follow = second_order(gaussian_x0, lambda t, s: schedule.point(schedule.midpoint(t.time, s.time), 4))
    for target_rows in (time[:2], time[:0]):
        for name in get_args(DistanceName):
            found = tcd_loss(
                follow, follow, gaussian_x0, x0, x0, points, target_rows=target_rows, distance=distance_of(name, 0.001)
            )
            for weighting in get_args(Weighting):
                weighted = loss_weights(points, weighting) * found
                assert weighted.shape == (4,) and weighted.dtype == torch.float32


@pytest.mark.parametrize("clock", ["discrete", "flow", "edm"])
def test_the_second_order_is_the_better_solver(clock: str) -> None:
    """On a Gaussian, whose trajectories are known, the error of a jump falls with the cube of its length."""
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, schedule = torch.full((4,), 700), CLOCKS[clock]

    def predict(x: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        alpha, sigma = t.level
        return MEAN + STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * (x - alpha * MEAN)

    errors: dict[int, list[float]] = {1: [], 2: []}
    for length in (160, 80):
        t, s = (in_float64(schedule.point(time, 4)) for time in (start, start - length))
        exact = gaussian_map(x_t, t.level, s.level)
        for order, follow in ((1, first_order(predict)), (2, second_order(predict, halfway(clock)))):
            errors[order].append(float((follow(x_t, t, s) - exact).norm()))
    assert errors[2][0] < 0.3 * errors[1][0]
    assert errors[1][0] / errors[1][1] == pytest.approx(4, rel=0.25)
    assert errors[2][0] / errors[2][1] == pytest.approx(8, rel=0.3)


@pytest.mark.parametrize("name", ["huber", "huber_sample", "l2"])
def test_a_distance_is_of_each_example_and_is_zero_where_they_agree(name: DistanceName) -> None:
    pred, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target[1] = pred[1]
    distance = distance_of(name, 0.03)
    found = distance(pred, target)
    assert found.shape == (3,) and found[1] == 0 and found[0] > 0
    torch.testing.assert_close(distance(pred[2:], target[2:]), found[2:])


@pytest.mark.parametrize("name", ["huber", "huber_sample"])
@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_huber_is_square_near_and_absolute_far(name: DistanceName, size: float) -> None:
    c = 0.03
    d = torch.full((2, 4, 8, 8), size, dtype=torch.float64)
    got = distance_of(name, c)(d, torch.zeros_like(d)).mean()
    expected = d.square().mean() / (2 * c) if size < c else d.abs().mean() - c
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-14)


def test_the_two_hubers_differ_where_errors_are_uneven() -> None:
    d = torch.zeros(1, 1, 10, 10)
    d[..., 0, 0] = 1.0
    assert distance_of("huber", 1e-6)(d, 0 * d).item() == pytest.approx(1 / 100, rel=1e-3)
    assert distance_of("huber_sample", 1e-6)(d, 0 * d).item() == pytest.approx(1 / 10, rel=1e-3)


@each_clock
def test_weights_by_the_length_of_the_jump_and_by_what_it_keeps_of_x0(clock: str) -> None:
    times = Times(torch.tensor([999, 519, 39]), torch.tensor([979, 499, 19]), torch.tensor([0, 499, 0]))
    points = exact_points(CLOCKS[clock], times)
    assert loss_weights(points, "none").tolist() == [1, 1, 1]
    assert loss_weights(points, "gap").tolist() == pytest.approx([20 / 999, 1.0, 20 / 39])
    # An error of x0 moves the jump's end by 1 / weight.
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    follow = first_order(lambda x, *_: torch.zeros_like(x)), first_order(lambda x, *_: torch.ones_like(x))
    x_s = [each(x, points.t, points.s) for each in follow]
    torch.testing.assert_close((x_s[1] - x_s[0]).mean((1, 2, 3)), 1 / loss_weights(points, "x0"))


def test_on_a_flow_x0s_share_of_a_jump_is_the_part_of_its_way() -> None:
    times = Times(torch.tensor([1000, 500, 40]), torch.tensor([980, 480, 20]), torch.tensor([0, 480, 10]))
    share = 1 / loss_weights(points_of(CLOCKS["flow"], times), "x0")
    torch.testing.assert_close(share, torch.tensor([1.0, 20 / 500, 30 / 40]))
