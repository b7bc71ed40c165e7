"""Clocks: tables against the reference scheduler, conversions against each other, and what people type."""

import math

import pytest
import torch
from diffusers import TCDScheduler

from ladders import GAMMAS
from tcd import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    alpha_bar_to_sigma,
    parse_timesteps,
    scaled_linear_alpha_bar,
    sigma_to_alpha_bar,
    timestep_grid,
    vp_level,
    zero_terminal_snr,
)


@pytest.fixture
def discrete() -> DiscreteSchedule:
    return DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())


# alpha_bar and sigma


def test_alpha_bar_is_that_of_the_reference_scheduler() -> None:
    reference = TCDScheduler().alphas_cumprod
    torch.testing.assert_close(scaled_linear_alpha_bar().float(), reference, rtol=1e-5, atol=0)


def test_zero_terminal_snr_is_that_of_the_reference_scheduler() -> None:
    reference = TCDScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    rescaled = zero_terminal_snr(scaled_linear_alpha_bar())
    torch.testing.assert_close(rescaled.float(), reference, rtol=1e-4, atol=1e-7)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], scaled_linear_alpha_bar()[0])


@pytest.mark.parametrize(
    ("timestep", "sigma"),
    [(0, 0.0292), (139, 0.4313), (259, 0.7194), (499, 1.6129), (759, 4.2606), (999, 14.6146)],
)
def test_sigma_of_a_timestep(discrete: DiscreteSchedule, timestep: int, sigma: float) -> None:
    assert float(discrete.sigma(torch.tensor(timestep))) == pytest.approx(sigma, abs=6e-5)


def test_sigma_and_alpha_bar_invert_each_other_up_to_pure_noise() -> None:
    alpha_bar = torch.tensor([1.0, 0.999, 0.5, 1e-6, 0.0], dtype=torch.float64)
    sigma = alpha_bar_to_sigma(alpha_bar)
    assert sigma[0] == 0
    assert sigma[2] == 1
    assert math.isinf(sigma[-1])
    torch.testing.assert_close(sigma_to_alpha_bar(sigma), alpha_bar)


def test_vp_level_preserves_variance_and_is_the_sigma_of_the_host_times_alpha() -> None:
    alpha_bar = torch.tensor([1.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    level = vp_level(alpha_bar)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(alpha_bar))
    torch.testing.assert_close((level.sigma / level.alpha)[:3], alpha_bar_to_sigma(alpha_bar)[:3])
    assert (level.alpha[-1], level.sigma[-1]) == (0, 1)


# The grid


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 679, 339]),
        (4, [999, 759, 499, 259]),
        (5, [999, 799, 599, 399, 199]),
        (6, [999, 839, 679, 499, 339, 179]),
        (7, [999, 859, 719, 579, 439, 299, 159]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (50, list(range(999, 0, -20))),
    ],
)
def test_grid(steps: int, timesteps: list[int]) -> None:
    assert timestep_grid(steps) == timesteps


@pytest.mark.parametrize("denoise", [0.02, 0.1, 0.29, 0.5, 0.58, 0.8, 0.99, 1.0])
def test_grid_is_that_of_the_reference_scheduler_for_every_number_of_steps(denoise: float) -> None:
    reference = TCDScheduler()
    for steps in range(1, int(50 * denoise) + 1):
        reference.set_timesteps(steps, strength=denoise)
        assert timestep_grid(steps, denoise=denoise) == reference.timesteps.tolist(), steps


def test_grid_of_another_distillation() -> None:
    assert timestep_grid(2, num_timesteps=1000, origin_steps=4) == [999, 499]
    assert timestep_grid(2, num_timesteps=100, origin_steps=10, denoise=0.5) == [49, 29]


def test_grid_without_denoising_is_empty() -> None:
    assert timestep_grid(4, denoise=0.0) == []


@pytest.mark.parametrize("steps", [0, -1, 2.0, "4", True, None])
def test_steps_that_are_no_positive_number_are_refused(steps: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 1 to 50"):
        timestep_grid(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("denoise", [-0.1, 1.1, math.nan, math.inf])
def test_denoise_out_of_range_is_refused(denoise: float) -> None:
    with pytest.raises(ValueError, match="denoise is .* must be from 0.0 to 1.0"):
        timestep_grid(4, denoise=denoise)


@pytest.mark.parametrize(
    ("steps", "denoise", "advice"),
    [
        (51, 1.0, "use steps of at most 50$"),
        (8, 0.1, "use steps of at most 5 or denoise of at least 0.16$"),
        (1, 0.01, "use denoise of at least 0.02$"),
    ],
)
def test_too_many_steps_are_refused_with_what_to_type(steps: int, denoise: float, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        timestep_grid(steps, denoise=denoise)


@pytest.mark.parametrize("origin_steps", [0, 1001])
def test_a_grid_finer_than_the_timesteps_is_refused(origin_steps: int) -> None:
    with pytest.raises(ValueError, match="origin_steps"):
        timestep_grid(1, origin_steps=origin_steps)


# Timesteps that a person types


@pytest.mark.parametrize(
    ("text", "timesteps"),
    [("800", [800]), ("999,759,499,259", [999, 759, 499, 259]), (" 999, 0 ", [999, 0])],
)
def test_parse_timesteps(text: str, timesteps: list[int]) -> None:
    assert parse_timesteps(text) == timesteps


@pytest.mark.parametrize("text", ["", "a", "999;499", "999,,499", "999,", "1e3", "999.5"])
def test_text_that_is_no_timesteps_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(ValueError, match="type whole numbers from 999 down to 0"):
        parse_timesteps(text)


@pytest.mark.parametrize(("text", "num_timesteps"), [("1000", 1000), ("-1", 1000), ("999,-5", 1000), ("100", 100)])
def test_timesteps_out_of_range_are_refused(text: str, num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=f"out of range: .* from {num_timesteps - 1} down to 0"):
        parse_timesteps(text, num_timesteps=num_timesteps)


@pytest.mark.parametrize("text", ["499,999", "999,999", "999,499,500"])
def test_timesteps_that_do_not_descend_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must descend"):
        parse_timesteps(text)


# Discrete schedules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timestep_inverts_sigma(dtype: torch.dtype, zero_snr: bool) -> None:
    alpha_bar = scaled_linear_alpha_bar()
    schedule = DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar)
    schedule = DiscreteSchedule(schedule.sigmas.to(dtype))
    timesteps = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigma(timesteps)), timesteps)
    assert schedule.timestep(schedule.sigma(timesteps)).dtype == torch.int64


def test_timestep_is_the_nearest_in_log_sigma() -> None:
    schedule = DiscreteSchedule(torch.tensor([1.0, 100.0]))
    assert schedule.timestep(torch.tensor([0.0, 1e-9, 9.9, 10.1, 1e9])).tolist() == [0, 0, 0, 1, 1]


def test_zero_terminal_snr_gets_a_finite_last_sigma_and_nothing_else_changes() -> None:
    alpha_bar = zero_terminal_snr(scaled_linear_alpha_bar())
    schedule = DiscreteSchedule.from_alpha_bar(alpha_bar)
    assert float(schedule.sigmas[-1]) == 4518.76
    assert torch.equal(schedule.sigmas[:-1], alpha_bar_to_sigma(alpha_bar)[:-1])


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, math.inf], [1.0, math.nan], [2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 1.0], [], [[1.0, 2.0]]],
)
def test_sigmas_that_are_no_schedule_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas"):
        DiscreteSchedule(torch.tensor(sigmas))


@pytest.mark.parametrize(("gamma", "targets"), [(0.3, [531, 349, 181]), (0.0, [759, 499, 259]), (1.0, [0, 0, 0])])
def test_discrete_targets_of_four_steps(discrete: DiscreteSchedule, gamma: float, targets: list[int]) -> None:
    sigmas = discrete.sigma(torch.tensor([759, 499, 259]))
    found = [discrete.timestep(discrete.target(sigma, gamma)) for sigma in sigmas]
    assert [int(t) for t in found] == targets


def test_discrete_target_floors_the_single_precision_product(discrete: DiscreteSchedule) -> None:
    # In double precision (1 - 0.9) * 500 falls short of 50.
    target = discrete.target(discrete.sigma(torch.tensor(500)), 0.9)
    assert int(discrete.timestep(target)) == 50


def test_discrete_target_never_rises_above_a_sigma_between_timesteps(discrete: DiscreteSchedule) -> None:
    for sigma in torch.logspace(-3, 1.2, 300, dtype=torch.float64):
        for gamma in (1e-9, 0.3, 1.0):
            assert discrete.target(sigma, gamma) <= sigma


# What all schedules have in common


@pytest.mark.parametrize("name", ["discrete", "flow", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_is_sigma_next_itself_without_gamma_and_at_the_end(
    name: str, dtype: torch.dtype, discrete: DiscreteSchedule
) -> None:
    schedule = {"discrete": discrete, "flow": FlowSchedule(), "edm": ContinuousSchedule()}[name]
    for sigma in torch.linspace(0.001, 0.999, 50, dtype=dtype):
        assert torch.equal(schedule.target(sigma, 0.0), sigma)
        assert schedule.target(sigma, 0.3).dtype == dtype
    for gamma in GAMMAS:
        assert schedule.target(torch.zeros((), dtype=dtype), gamma) == 0


def test_flow_target_is_on_the_flow_clock() -> None:
    sigma = torch.tensor(0.6, dtype=torch.float64)
    assert float(FlowSchedule().target(sigma, 0.3)) == pytest.approx(0.7 * 0.6)
    assert float(FlowSchedule().target(sigma, 1.0)) == 0


@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_continuous_target_is_on_the_flow_clock(sigma: float, gamma: float) -> None:
    target = float(ContinuousSchedule().target(torch.tensor(sigma, dtype=torch.float64), gamma))
    assert target / (1 + target) == pytest.approx((1 - gamma) * sigma / (1 + sigma))


def test_levels_are_those_of_the_scale(discrete: DiscreteSchedule) -> None:
    sigma = torch.tensor(0.6)
    assert discrete.level(sigma) == (1, sigma)
    assert ContinuousSchedule().level(sigma) == (1, sigma)
    assert FlowSchedule().level(sigma) == (1 - sigma, sigma)
