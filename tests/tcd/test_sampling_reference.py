"""The sampler against an independent implementation: diffusers' TCDScheduler, fed the same network and the same noise.

The two end differently. The reference ends at timestep 0, where alpha_bar is 0.99915, and so leaves 0.029 of the noise
in its result; ours ends at sigma = 0 with x0. The comparison takes our last step to the reference's end.
"""

from collections.abc import Iterator

import pytest
import torch
from diffusers import TCDScheduler
from diffusers.schedulers import scheduling_tcd
from torch import Tensor

from ladders import GAMMAS
from trajectory_consistency.tcd import (
    DiscreteSchedule,
    Level,
    Prediction,
    sample_tcd,
    scaled_linear_alpha_bar,
    sigma_to_alpha_bar,
    timestep_grid,
    to_x0,
    vp_level,
    zero_terminal_snr,
)

REFERENCE_NAME: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TOLERANCE = 1e-5


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """Some network, in the variance preserving scale; what it outputs is taken for eps, v or x0."""
    return torch.tanh(1.3 * x + timestep / 500 - 1)


def draws(count: int) -> Iterator[Tensor]:
    return (normal(seed) for seed in range(100, 100 + count))


def normal(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_states(
    scheduler: TCDScheduler, x: Tensor, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], int]:
    """Run the reference from x; return the states before each step and at its end, and how often it drew noise."""
    noise = list(draws(len(scheduler.timesteps)))
    remaining = iter(noise)
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *_, **__: next(remaining))
    states = [x]
    for timestep in scheduler.timesteps:
        states.append(scheduler.step(network(states[-1], timestep), timestep, states[-1], eta=gamma).prev_sample)
    return states, len(noise) - len(list(remaining))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_agrees(
    scheduler: TCDScheduler, timesteps: list[int], prediction: Prediction, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())
    sigmas = torch.cat([schedule.sigma(torch.tensor(timesteps)), torch.zeros(1, dtype=torch.float64)])
    ours: list[Tensor] = []
    last: list[tuple[Tensor, Tensor]] = []
    noise = draws(len(timesteps))
    drawn: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        level = vp_level(sigma_to_alpha_bar(sigma))
        x = level.alpha * x
        return to_x0(network(x, schedule.timestep(sigma)), x, level, prediction)

    def report(i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
        ours.append(x * sigma_to_alpha_bar(sigma).sqrt())
        last[:] = [((x - x0) / sigma, x0)]

    def draw(sigma_next: Tensor, like: Tensor) -> Tensor:
        drawn.append(next(noise))
        return drawn[-1]

    x = normal(0)
    start = x * (1 + sigmas[0] ** 2).sqrt()
    out = sample_tcd(denoise, start, sigmas, schedule=schedule, gamma=gamma, noise=draw, report=report)
    expected, num_drawn = reference_states(scheduler, x, gamma, monkeypatch)
    eps, x0 = last[0]
    alpha, sigma = vp_level(scaled_linear_alpha_bar()[0])
    ours.append(alpha * x0 + sigma * eps)

    assert torch.equal(out, x0)
    assert len(drawn) == num_drawn
    assert len(ours) == len(expected) == len(timesteps) + 1
    for found, wanted in zip(ours, expected, strict=True):
        assert relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("prediction", REFERENCE_NAME)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_agrees_at_every_step(
    steps: int, gamma: float, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = TCDScheduler(prediction_type=REFERENCE_NAME[prediction])
    scheduler.set_timesteps(steps)
    assert_agrees(scheduler, timestep_grid(steps), prediction, gamma, monkeypatch)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.7, 0.9])
def test_agrees_where_rounding_decides_the_target(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    timesteps = [999, 900, 805, 700, 613, 500, 407, 300, 201, 100, 11]
    scheduler = TCDScheduler()
    scheduler.set_timesteps(timesteps=timesteps)
    assert_agrees(scheduler, timesteps, "eps", gamma, monkeypatch)


class VariancePreserving:
    """The integer clock in the paper's scale, where pure noise (alpha = 0) is a level like any other."""

    def __init__(self, alpha_bar: Tensor) -> None:
        self.sigmas = vp_level(alpha_bar).sigma

    def level(self, sigma: Tensor) -> Level:
        return Level((1 - sigma**2).clamp(min=0).sqrt(), sigma)

    def target_sigma(self, sigma_next: Tensor, gamma: float) -> Tensor:
        s = torch.floor((1 - gamma) * torch.searchsorted(self.sigmas, sigma_next))
        return torch.minimum(self.sigmas[s.long()], sigma_next)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_agrees_at_zero_terminal_snr(
    steps: int, gamma: float, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = TCDScheduler(prediction_type=REFERENCE_NAME[prediction], rescale_betas_zero_snr=True)
    scheduler.set_timesteps(steps)
    expected, _ = reference_states(scheduler, normal(0), gamma, monkeypatch)

    schedule = VariancePreserving(zero_terminal_snr(scaled_linear_alpha_bar()))
    sigmas = schedule.sigmas[torch.tensor([*timestep_grid(steps), 0])]
    noise = draws(steps)

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        timestep = torch.searchsorted(schedule.sigmas, sigma)
        return to_x0(network(x, timestep), x, schedule.level(sigma), prediction)

    found = sample_tcd(denoise, normal(0), sigmas, schedule=schedule, gamma=gamma, noise=lambda *_: next(noise))
    assert schedule.level(sigmas[0]).alpha == 0
    assert relative_error(found, expected[-1]) < TOLERANCE
