"""The equations, against what defines them: the closed form of a Gaussian, the paper's form, and conservation laws."""

import pytest
import torch
from torch import Tensor

from oracles import gaussian_map, randn, x0_for_target
from trajectory_consistency.tcd import Level, add_noise, jump, renoise, vp_level


def levels(scale: str, *times: float) -> list[Level]:
    """Levels of three scales at flow times in [0, 1], float64, 0-dim."""
    sigma = torch.tensor(times, dtype=torch.float64)
    if scale == "flow":
        return [Level(1 - s, s) for s in sigma]
    if scale == "vp":
        return [vp_level(1 - s**2) for s in sigma]
    return [Level(torch.ones_like(s), s / (1 - s)) for s in sigma]


SCALES = ["vp", "flow", "ve"]


@pytest.fixture
def x0() -> Tensor:
    return randn(3, 4, 5, 6, seed=1)


@pytest.fixture
def eps() -> Tensor:
    return randn(3, 4, 5, 6, seed=2)


@pytest.mark.parametrize("scale", SCALES)
def test_jump_keeps_the_noise_of_the_point_it_came_from(scale: str, x0: Tensor, eps: Tensor) -> None:
    t, s = levels(scale, 0.8, 0.3)
    torch.testing.assert_close(jump(add_noise(x0, eps, t), x0, t, s), s.alpha * x0 + s.sigma * eps)


@pytest.mark.parametrize("scale", SCALES)
def test_jumps_along_one_trajectory_compose(scale: str, x0: Tensor, eps: Tensor) -> None:
    t, u, s = levels(scale, 0.9, 0.5, 0.2)
    x_t = add_noise(x0, eps, t)
    torch.testing.assert_close(jump(jump(x_t, x0, t, u), x0, u, s), jump(x_t, x0, t, s))


@pytest.mark.parametrize("scale", SCALES)
def test_jumps_of_a_network_with_target_time_compose_on_a_gaussian(scale: str, eps: Tensor) -> None:
    t, u, s = levels(scale, 0.9, 0.5, 0.2)
    x_u = jump(eps, x0_for_target(eps, t, u), t, u)
    direct = jump(eps, x0_for_target(eps, t, s), t, s)
    torch.testing.assert_close(direct, gaussian_map(eps, t, s))
    torch.testing.assert_close(jump(x_u, x0_for_target(x_u, u, s), u, s), direct)


@pytest.mark.parametrize("scale", SCALES)
def test_jump_equals_the_exponential_integrator_of_the_paper(scale: str, x0: Tensor, eps: Tensor) -> None:
    t, s = levels(scale, 0.8, 0.3)
    h = torch.log(s.alpha / s.sigma) - torch.log(t.alpha / t.sigma)
    paper = s.sigma / t.sigma * eps - s.alpha * torch.expm1(-h) * x0
    torch.testing.assert_close(jump(eps, x0, t, s), paper, rtol=1e-13, atol=1e-13)


def test_jump_is_the_same_in_the_host_scale(x0: Tensor, eps: Tensor) -> None:
    t, s = levels("vp", 0.8, 0.3)
    host_t, host_s = (Level(torch.ones_like(a), b / a) for a, b in (t, s))
    torch.testing.assert_close(jump(eps / t.alpha, x0, host_t, host_s) * s.alpha, jump(eps, x0, t, s))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("time", [0.0, 1e-4, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jump_to_where_it_stands_returns_x_to_the_last_bit(scale: str, time: float, dtype: torch.dtype) -> None:
    t = Level(*(part.to(dtype) for part in levels(scale, time)[0]))
    x, x0 = randn(2, 3, dtype=dtype), randn(2, 3, seed=1, dtype=dtype)
    assert torch.equal(jump(x, x0, t, t), x)


@pytest.mark.parametrize("scale", SCALES)
def test_jump_to_the_clean_level_returns_x0_to_the_last_bit(scale: str, x0: Tensor, eps: Tensor) -> None:
    t, clean = levels(scale, 0.8, 0.0)
    assert torch.equal(jump(eps, x0, t, clean), x0)


def test_jump_from_zero_terminal_snr_takes_x_for_the_noise(x0: Tensor, eps: Tensor) -> None:
    t, s = levels("vp", 1.0, 0.3)
    assert t.alpha == 0
    torch.testing.assert_close(jump(eps, x0, t, s), s.alpha * x0 + s.sigma * eps)


def test_jump_takes_a_level_for_each_item_of_a_batch(x0: Tensor, eps: Tensor) -> None:
    ts, ss = levels("vp", 0.9, 0.5, 0.0), levels("vp", 0.4, 0.5, 0.0)
    t, s = (Level(*(torch.stack(part).view(3, 1, 1, 1) for part in zip(*each, strict=True))) for each in (ts, ss))
    alone = [jump(eps[i], x0[i], ts[i], ss[i]) for i in range(3)]
    torch.testing.assert_close(jump(eps, x0, t, s), torch.stack(alone))


@pytest.mark.parametrize("scale", SCALES)
def test_renoise_keeps_the_signal_and_adds_the_variance_that_lacks(scale: str, x0: Tensor) -> None:
    s, t = levels(scale, 0.3, 0.8)
    signal = renoise(s.alpha * x0, s, t, torch.zeros_like(x0))
    added = renoise(torch.zeros_like(x0), s, t, torch.ones_like(x0))
    kept = renoise(s.sigma * torch.ones_like(x0), s, t, torch.zeros_like(x0))
    torch.testing.assert_close(signal, t.alpha * x0)
    torch.testing.assert_close(added**2 + kept**2, (t.sigma**2).expand_as(x0))


def test_renoise_has_the_noise_factor_of_the_reference_scheduler(eps: Tensor) -> None:
    alpha_bar = torch.tensor([0.8, 0.2], dtype=torch.float64)
    s, t = (vp_level(each) for each in alpha_bar)
    factor = (1 - alpha_bar[1] / alpha_bar[0]).sqrt()
    torch.testing.assert_close(renoise(torch.zeros_like(eps), s, t, eps), factor * eps)


def test_renoise_to_where_it_stands_returns_x_however_the_level_is_rounded() -> None:
    sigma = torch.linspace(0.01, 0.999, 20_000, dtype=torch.float32)
    t, x = Level(1 - sigma, sigma), randn(20_000, dtype=torch.float32)
    assert torch.equal(renoise(x, t, t, torch.ones_like(x)), x)


@pytest.mark.parametrize("scale", SCALES)
def test_renoise_from_the_clean_level_is_add_noise(scale: str, x0: Tensor, eps: Tensor) -> None:
    clean, t = levels(scale, 0.0, 0.8)
    torch.testing.assert_close(renoise(x0, clean, t, eps), add_noise(x0, eps, t))


def test_gradient_reaches_the_prediction_by_the_weight_of_x0(x0: Tensor, eps: Tensor) -> None:
    t, s = levels("vp", 0.8, 0.3)
    x0.requires_grad_()
    jump(eps, x0, t, s).sum().backward()
    weight = s.alpha - s.sigma * t.alpha / t.sigma
    torch.testing.assert_close(x0.grad, weight.expand_as(x0))
