"""The loss against networks whose answers are known, and against the paper's form of it, written out."""

import pytest
import torch
from torch import Tensor

from tcd import Level, add_noise, scaled_linear_alpha_bar, vp_level
from trainer.objective import pseudo_huber, tcd_loss
from trainer.times import Times, sample_times

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
    got = tcd_loss(student, gaussian_x0, x0, eps, times, level=level, huber_c=0.01)
    torch.testing.assert_close(got, expected)


def test_a_network_that_knows_the_point_has_no_loss() -> None:
    x0, eps, times = batch()
    knows = lambda x_t, timesteps, rows: x0[rows]  # noqa: E731
    assert tcd_loss(knows, knows, x0, eps, times, level=level, huber_c=0.001) < 1e-12


def test_the_order_of_the_batch_does_not_matter() -> None:
    x0, eps, times = batch()
    flip = torch.arange(7, -1, -1)
    loss = tcd_loss(gaussian_x0, gaussian_x0, x0, eps, times, level=level, huber_c=0.001)
    flipped = Times(*(time[flip] for time in times))
    torch.testing.assert_close(
        tcd_loss(gaussian_x0, gaussian_x0, x0[flip], eps[flip], flipped, level=level, huber_c=0.001), loss
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

    tcd_loss(student, teacher, x0, eps, times, level=level, huber_c=0.001).backward()
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

    assert tcd_loss(never_for_the_target, gaussian_x0, x0, eps, times, level=level, huber_c=0.001) < 1e-12


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_pseudo_huber_is_square_near_and_absolute_far(size: float) -> None:
    c = 0.03
    d = torch.full((2, 4, 8, 8), size, dtype=torch.float64)
    got = pseudo_huber(d, torch.zeros_like(d), c)
    expected = d.square().mean() / (2 * c) if size < c else d.abs().mean() - c
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-14)
