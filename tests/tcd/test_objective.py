"""The loss against networks whose answers are known, and against the paper's form of it, written out."""

import pytest
import torch
from torch import Tensor

from oracles import MEAN, STD, gaussian_map, told_x0
from trajectory_consistency.tcd import Level, add_noise, scaled_linear_alpha_bar, vp_level
from trajectory_consistency.tcd.objective import (
    DistanceName,
    Predict,
    Told,
    distance_of,
    first_order,
    second_order,
    tcd_loss,
    weights,
)
from trajectory_consistency.tcd.times import Times, sample_times
from trajectory_consistency.trainer.models.unet.network import Network

ALPHA_BAR = scaled_linear_alpha_bar()


def level(timesteps: Tensor) -> Level:
    return vp_level(ALPHA_BAR[timesteps].view(-1, 1, 1, 1))


def gaussian_x0(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
    """E[x0 | x_t] for data N(0, 0.5^2): what a perfect network predicts."""
    t = level(timesteps)
    return 0.25 * t.alpha / (0.25 * t.alpha**2 + t.sigma**2) * x_t


def batch(count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Times]:
    generator = torch.Generator().manual_seed(seed)
    x0 = 0.5 * torch.randn(count, 4, 8, 8, generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return x0, eps, sample_times(count, law="uniform", origin_steps=50, skip=20, generator=generator)


def loss(student: Predict, teacher: Predict, x0: Tensor, eps: Tensor, times: Times, c: float = 0.001) -> Tensor:
    """TCD's own: first order, the student itself as target, Huber of each element, every example alike."""
    return told_loss(untold(student), teacher, x0, eps, times, c)


def untold(predict: Predict) -> Told:
    """A prediction that does not heed s."""
    return lambda x_t, t, s, rows: predict(x_t, t, rows)


def told_loss(student: Told, teacher: Predict, x0: Tensor, eps: Tensor, times: Times, c: float = 0.001) -> Tensor:
    follow = first_order(student, level)
    return tcd_loss(follow, follow, teacher, x0, eps, times, level=level, distance=distance_of("huber", c)).mean()


def exponential_integrator(x: Tensor, x0: Tensor, t: Level, s: Level) -> Tensor:
    """TCF(1) as the paper prints it."""
    h = (s.alpha / s.sigma).log() - (t.alpha / t.sigma).log()
    return s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * x0


def test_it_is_the_papers_loss_written_out() -> None:
    x0, eps, times = batch()
    t, t_next, s = (level(time) for time in times)

    def student(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        return 0.3 * x_t + timesteps.view(-1, 1, 1, 1) / 1000 + rows.view(-1, 1, 1, 1)

    x_t = add_noise(x0, eps, t)
    rows = torch.arange(8)
    x_next = exponential_integrator(x_t, gaussian_x0(x_t, times.t, rows), t, t_next)
    target = exponential_integrator(x_next, student(x_next, times.t_next, rows), t_next, s)
    pred = exponential_integrator(x_t, student(x_t, times.t, rows), t, s)
    expected = ((pred - target) ** 2 + 0.01**2).sqrt().mean() - 0.01
    got = loss(student, gaussian_x0, x0, eps, times, c=0.01)
    torch.testing.assert_close(got, expected)


def test_a_network_that_knows_the_point_has_no_loss() -> None:
    x0, eps, times = batch()
    knows = lambda x_t, timesteps, rows: x0[rows]  # noqa: E731
    assert loss(knows, knows, x0, eps, times) < 1e-12


def test_the_order_of_the_batch_does_not_matter() -> None:
    x0, eps, times = batch()
    flip = torch.arange(7, -1, -1)
    flipped = Times(*(time[flip] for time in times))
    torch.testing.assert_close(
        loss(gaussian_x0, gaussian_x0, x0[flip], eps[flip], flipped), loss(gaussian_x0, gaussian_x0, x0, eps, times)
    )


def test_only_the_prediction_has_a_gradient_and_the_student_comes_last() -> None:
    x0, eps, times = batch(64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls: list[tuple[str, bool, int]] = []

    def student(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        calls.append(("student", torch.is_grad_enabled(), len(rows)))
        return weight * gaussian_x0(x_t, timesteps, rows)

    def teacher(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        calls.append(("teacher", torch.is_grad_enabled(), len(rows)))
        return gaussian_x0(x_t, timesteps, rows)

    loss(student, teacher, x0, eps, times).backward()
    moved = int((times.s < times.t_next).sum())
    assert 0 < moved < 64, "the batch must have rows with s = t_next and others"
    assert calls == [("teacher", False, 64), ("student", False, moved), ("student", True, 64)]
    assert weight.grad is not None and weight.grad != 0


def test_where_s_is_t_next_the_target_is_the_teachers_step() -> None:
    x0, eps, _ = batch(1)
    times = Times(torch.tensor([519]), torch.tensor([499]), torch.tensor([499]))

    def never_for_the_target(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        assert torch.is_grad_enabled(), "the target needs no forward here"
        return gaussian_x0(x_t, timesteps, rows)

    assert loss(never_for_the_target, gaussian_x0, x0, eps, times) < 1e-12


def test_the_target_may_be_another_network_than_the_student() -> None:
    x0, eps, times = batch()
    times = Times(times.t, times.t_next, torch.zeros_like(times.s))
    knows: Predict = lambda x, t, rows: x0[rows]  # noqa: E731
    right, wrong = first_order(untold(knows), level), first_order(lambda x, t, s, rows: x0[rows] + 1, level)
    options = {"level": level, "distance": distance_of("l2", 0.0)}
    clean = level(times.s).sigma.flatten() / level(times.t).sigma.flatten()
    assert (tcd_loss(right, right, knows, x0, eps, times, **options) < 1e-12).all()
    off = tcd_loss(right, wrong, knows, x0, eps, times, **options)
    assert (off[times.t_next > 0] > 0.9 * (1 - clean[times.t_next > 0]) ** 2).all()


def test_a_network_that_is_told_s_can_have_no_loss_at_all() -> None:
    """On a Gaussian: its exact trajectories are jumps of a network that is told s, and of none that is not."""
    x0, eps, times = batch(32)

    def knows(x_t: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        return told_x0(x_t, level(t), level(s))

    def exact_step(x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return told_x0(x_t, level(t), level(times.t_next[rows]))

    assert told_loss(knows, exact_step, x0, eps, times) < 1e-9
    elsewhere = lambda x_t, t, s, rows: knows(x_t, t, s // 2, rows)  # noqa: E731
    assert told_loss(elsewhere, exact_step, x0, eps, times) > 1e-3
    assert loss(gaussian_x0, exact_step, x0, eps, times) > 1e-3


def test_the_second_order_is_the_better_solver() -> None:
    """On a Gaussian, whose trajectories are known, the error of a jump falls with the cube of its length."""
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, start = torch.arange(4), torch.full((4,), 700)
    clock = Network(None, ALPHA_BAR, "eps")

    def knows(x: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        t = clock.level(timesteps)
        return MEAN + STD**2 * t.alpha / (STD**2 * t.alpha**2 + t.sigma**2) * (x - t.alpha * MEAN)

    errors: dict[int, list[float]] = {1: [], 2: []}
    for length in (160, 80):
        goal = start - length
        exact = gaussian_map(x_t, level(start), level(goal))
        for order, follow in (
            (1, first_order(untold(knows), clock.level)),
            (2, second_order(untold(knows), clock.level, clock.midpoint)),
        ):
            errors[order].append(float((follow(x_t, start, goal, rows) - exact).norm()))
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


def test_weights_by_the_length_of_the_jump_and_by_what_it_keeps_of_x0() -> None:
    times = Times(torch.tensor([999, 519, 39]), torch.tensor([979, 499, 19]), torch.tensor([0, 499, 0]))
    assert weights(times, level, "none").tolist() == [1, 1, 1]
    assert weights(times, level, "gap").tolist() == pytest.approx([20 / 999, 1.0, 20 / 39])
    # An error of x0 moves the jump's end by 1 / weight.
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    follow = first_order(lambda x, *_: torch.zeros_like(x), level), first_order(lambda x, *_: torch.ones_like(x), level)
    x_s = [each(x, times.t, times.s, torch.arange(3)) for each in follow]
    torch.testing.assert_close((x_s[1] - x_s[0]).mean((1, 2, 3)), 1 / weights(times, level, "x0"))


def test_the_midpoint_is_half_way_in_half_log_snr_and_its_level_is_there() -> None:
    clock = Network(None, ALPHA_BAR, "eps")
    t, s = torch.tensor([999, 519, 19, 1]), torch.tensor([0, 500, 0, 0])
    u = clock.midpoint(t, s)
    half_log_snr = [(each.alpha / each.sigma).log() for each in (level(t), clock.level(u), level(s))]
    torch.testing.assert_close(half_log_snr[1], (half_log_snr[0] + half_log_snr[2]) / 2)
    assert ((s < u) & (u < t)).all()
    whole = torch.tensor([0, 1, 500, 998, 999])
    for a, b in zip(clock.level(whole.double()), clock.level(whole), strict=True):
        torch.testing.assert_close(a, b)
