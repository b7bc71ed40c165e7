"""Clocks: tables against the reference scheduler, conversions against each other, and what people type."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import TCDScheduler
from torch import Tensor

from ladders import GAMMAS
from trajectory_consistency.tcd import (
    BridgeSchedule,
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    alpha_bar_to_sigma,
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


@pytest.mark.parametrize(
    ("gamma", "targets"),
    [(0.3, [531, 349, 181]), (0.5, [379, 249, 129]), (0.0, [759, 499, 259]), (1.0, [0, 0, 0])],
)
def test_discrete_targets_of_four_steps(discrete: DiscreteSchedule, gamma: float, targets: list[int]) -> None:
    sigmas = discrete.sigma(torch.tensor([759, 499, 259]))
    found = [discrete.timestep(discrete.target_sigma(sigma, gamma)) for sigma in sigmas]
    assert [int(t) for t in found] == targets


def test_discrete_target_floors_the_single_precision_product(discrete: DiscreteSchedule) -> None:
    # In double precision (1 - 0.9) * 500 falls short of 50.
    target = discrete.target_sigma(discrete.sigma(torch.tensor(500)), 0.9)
    assert int(discrete.timestep(target)) == 50


def test_discrete_target_never_rises_above_a_sigma_between_timesteps(discrete: DiscreteSchedule) -> None:
    for sigma in torch.logspace(-3, 1.2, 300, dtype=torch.float64):
        for gamma in (1e-9, 0.3, 1.0):
            assert discrete.target_sigma(sigma, gamma) <= sigma


@pytest.fixture
def distilled(discrete: DiscreteSchedule) -> DiscreteSchedule:
    """What is left of `discrete` in a model that knows each 20th timestep: 19, 39 ... 999."""
    return DiscreteSchedule(discrete.sigmas[19::20], num_timesteps=1000)


def test_a_distilled_model_keeps_the_clock_of_all_timesteps(
    discrete: DiscreteSchedule, distilled: DiscreteSchedule
) -> None:
    known = torch.arange(19, 1000, 20)
    assert torch.equal(distilled.sigma(known), discrete.sigmas[19::20])
    assert torch.equal(distilled.timestep(discrete.sigma(known)), known)
    assert int(distilled.timestep(discrete.sigma(torch.tensor(752)))) == 759
    assert [int(distilled.timestep(torch.tensor(sigma))) for sigma in (0.0, 1e9)] == [19, 999]


def test_between_the_timesteps_known_log_sigma_is_linear(distilled: DiscreteSchedule) -> None:
    low, high = distilled.sigma(torch.tensor([519, 539])).log()
    found = distilled.sigma(torch.tensor([524, 529, 534])).log()
    torch.testing.assert_close(found, torch.lerp(low, high, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)))
    assert torch.equal(distilled.sigma(torch.tensor([0, 18])), distilled.sigmas[[0, 0]])


def test_a_distilled_model_has_the_targets_of_all_timesteps(
    discrete: DiscreteSchedule, distilled: DiscreteSchedule
) -> None:
    sigmas = discrete.sigma(torch.tensor([759, 499, 259]))
    torch.testing.assert_close(
        distilled.target_sigma(sigmas, 0.3), discrete.target_sigma(sigmas, 0.3), rtol=2e-3, atol=0
    )
    assert torch.equal(distilled.target_sigma(sigmas, 1.0), distilled.sigmas[[0, 0, 0]])
    assert distilled.target_sigma(distilled.sigmas[0], 0.3) == distilled.sigmas[0]


@pytest.mark.parametrize("num_timesteps", [1, 3, 0, -2])
def test_timesteps_that_the_sigmas_do_not_divide_are_refused(num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=f"num_timesteps is {num_timesteps}, but must be a multiple of the 2 sigmas"):
        DiscreteSchedule(torch.tensor([1.0, 2.0]), num_timesteps=num_timesteps)


# N steps


def test_a_discrete_clock_steps_through_the_distillation_grid(discrete: DiscreteSchedule) -> None:
    for steps, denoise in ((1, 1.0), (4, 1.0), (50, 1.0), (2, 0.5)):
        expected = [*discrete.sigmas[timestep_grid(steps, denoise=denoise)].tolist(), 0.0]
        assert discrete.sigmas_for(steps, denoise).tolist() == expected


def test_a_discrete_clock_refines_its_grid_only_where_asked(discrete: DiscreteSchedule) -> None:
    assert torch.equal(discrete.sigmas_for(50, refine=True), discrete.sigmas_for(50))
    with pytest.raises(ValueError, match="use steps of at most 50"):
        discrete.sigmas_for(51)
    assert torch.equal(discrete.sigmas_for(1000, refine=True)[:-1], discrete.sigmas.flip(0))
    with pytest.raises(ValueError, match="use fewer steps or a higher denoise"):
        discrete.sigmas_for(1001, refine=True)


def test_a_flow_steps_evenly_in_shifted_time() -> None:
    assert FlowSchedule().sigmas_for(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert FlowSchedule(lambda u: u**2).sigmas_for(2, denoise=0.5).tolist() == [0.25, 0.0625, 0.0]
    assert len(FlowSchedule().sigmas_for(5000)) == 5001


@pytest.mark.parametrize("shift", [lambda u: 0 * u / (1 - u), lambda u: 1 - u, lambda u: u / 0])
def test_a_shift_that_gives_no_levels_is_refused(shift: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="no sigmas that descend from 1 to 0"):
        FlowSchedule(shift).sigmas_for(4)


@pytest.mark.parametrize("denoise", [1.0, 0.3])
def test_a_continuous_clock_steps_evenly_in_flow_time(denoise: float) -> None:
    sigmas = ContinuousSchedule(120.0).sigmas_for(5, denoise).double()
    times = sigmas / (1 + sigmas)
    torch.testing.assert_close(times, torch.linspace(denoise * 120 / 121, 0, 6, dtype=torch.float64))
    assert ContinuousSchedule(120.0).sigmas_for(1).tolist() == [120.0, 0.0]


def test_timesteps_are_typed_on_the_clock_of_the_network(discrete: DiscreteSchedule) -> None:
    assert torch.equal(discrete.sigmas_at("800, 0"), torch.cat([discrete.sigmas[[800, 0]], torch.zeros(1)]))
    shifted = FlowSchedule(lambda u: u**2)
    assert shifted.sigmas_at("1000,913.5").tolist() == pytest.approx([1.0, 0.9135, 0.0])
    with pytest.raises(ValueError, match="timesteps is '800', but this model has none, as its time is its sigma"):
        ContinuousSchedule().sigmas_at("800")


def test_a_bridge_keeps_what_it_has(discrete: DiscreteSchedule) -> None:
    bridge, sigmas = BridgeSchedule(discrete.sigmas), discrete.sigmas_for(4)
    assert torch.equal(bridge.target_sigma(sigmas, 0.0), sigmas)
    assert torch.equal(bridge.target_sigma(sigmas[-1:], 0.3), sigmas[-1:])  # one step: gamma has no say
    with pytest.raises(ValueError, match=r"gamma \(eta\) is 0.3, .* knows no noise: set it to 0, or go in one step"):
        bridge.target_sigma(sigmas[1:], 0.3)


# What all schedules have in common


@pytest.mark.parametrize("name", ["discrete", "flow", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_is_sigma_next_itself_without_gamma_and_at_the_end(
    name: str, dtype: torch.dtype, discrete: DiscreteSchedule
) -> None:
    schedule = {"discrete": discrete, "flow": FlowSchedule(), "edm": ContinuousSchedule()}[name]
    for sigma in torch.linspace(0.001, 0.999, 50, dtype=dtype):
        assert torch.equal(schedule.target_sigma(sigma, 0.0), sigma)
        assert schedule.target_sigma(sigma, 0.3).dtype == dtype
    for gamma in GAMMAS:
        assert schedule.target_sigma(torch.zeros((), dtype=dtype), gamma) == 0


def test_flow_target_is_on_the_flow_clock() -> None:
    sigma = torch.tensor(0.6, dtype=torch.float64)
    assert float(FlowSchedule().target_sigma(sigma, 0.3)) == pytest.approx(0.7 * 0.6)
    assert float(FlowSchedule().target_sigma(sigma, 1.0)) == 0


@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_continuous_target_is_on_the_flow_clock(sigma: float, gamma: float) -> None:
    target = float(ContinuousSchedule().target_sigma(torch.tensor(sigma, dtype=torch.float64), gamma))
    assert target / (1 + target) == pytest.approx((1 - gamma) * sigma / (1 + sigma))


def test_levels_are_those_of_the_scale(discrete: DiscreteSchedule) -> None:
    sigma = torch.tensor(0.6)
    assert discrete.level(sigma) == (1, sigma)
    assert ContinuousSchedule().level(sigma) == (1, sigma)
    assert FlowSchedule().level(sigma) == (1 - sigma, sigma)


@pytest.mark.parametrize("name", ["discrete", "bridge", "flow", "edm"])
def test_steps_end_clean_and_no_denoising_is_no_step(name: str, discrete: DiscreteSchedule) -> None:
    schedules: dict[str, Schedule] = {
        "discrete": discrete,
        "bridge": BridgeSchedule(discrete.sigmas),
        "flow": FlowSchedule(),
        "edm": ContinuousSchedule(),
    }
    schedule = schedules[name]
    for steps in (1, 2, 50):
        sigmas = schedule.sigmas_for(steps)
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0
        assert len(sigmas) == steps + 1
    assert schedule.sigmas_for(4, 0.0).shape == (0,)
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            schedule.sigmas_for(steps)  # type: ignore[arg-type]
    for denoise in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"denoise is .* must be from 0.0 to 1.0"):
            schedule.sigmas_for(4, denoise)
