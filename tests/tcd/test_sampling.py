"""The sampler, against data whose trajectories are known exactly, and the promises it makes to those who call it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ladders import GAMMAS, LADDERS
from oracles import MEAN, STD, gaussian_map, randn, x0_for_target
from trajectory_consistency.tcd import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    Schedule,
    sample_tcd,
    seeded_noise,
)


@dataclass
class Recorder:
    """Keeps what is reported, beside copies of it as it was."""

    steps: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
        self.steps.append((i, x, sigma, x0))
        self.copies.append((x.clone(), x0.clone()))


def no_noise(sigma_next: Tensor, like: Tensor) -> Tensor:
    raise AssertionError(f"noise was drawn for sigma {float(sigma_next)}")


def smooth(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
    """A network that is not linear, does not get s, and works on each number alone."""
    return torch.sin(3 * x / (1 + sigma)) + 0.1 * x / (1 + sigma)


def marginal(schedule: Schedule, sigma: Tensor) -> tuple[float, float]:
    alpha, sigma = schedule.level(sigma)
    return float(alpha * MEAN), float((alpha**2 * STD**2 + sigma**2).sqrt())


def gaussian_network(schedule: Schedule) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The network whose jump to the target time s follows the exact trajectory of data ~ N(MEAN, STD^2)."""
    return lambda x, sigma, sigma_s: x0_for_target(x, schedule.level(sigma), schedule.level(sigma_s))


@pytest.fixture(params=LADDERS)
def ladder(request: pytest.FixtureRequest) -> Callable[[int], tuple[Schedule, Tensor]]:
    return LADDERS[request.param]


# Data whose trajectories are known


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_point_mass_is_returned_exactly(ladder, steps: int, gamma: float) -> None:
    schedule, sigmas = ladder(steps)
    record = Recorder()
    x = sigmas[0] * randn(3, 4, 8, 8) + schedule.level(sigmas[0]).alpha * 2
    out = sample_tcd(
        lambda x, *_: torch.full_like(x, 2),
        x,
        sigmas,
        schedule=schedule,
        gamma=gamma,
        noise=seeded_noise(0),
        report=record,
    )
    assert torch.equal(out, torch.full_like(x, 2))
    for _, x_t, sigma, _ in record.steps:
        alpha, sigma = schedule.level(sigma)
        eps = (x_t - alpha * 2) / sigma
        assert abs(float(eps.std()) - 1) < 0.15  # 768 numbers; a standard error is 0.026
        if gamma == 0:
            torch.testing.assert_close(eps, randn(3, 4, 8, 8))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_gaussian_has_the_right_mean_and_std_at_every_level(ladder, steps: int, gamma: float) -> None:
    schedule, sigmas = ladder(steps)
    mean, std = marginal(schedule, sigmas[0])
    x = mean + std * randn(4, 50_000)
    record = Recorder()
    out = sample_tcd(
        gaussian_network(schedule), x, sigmas, schedule=schedule, gamma=gamma, noise=seeded_noise(3), report=record
    )
    states = [(x_t, sigma) for _, x_t, sigma, _ in record.steps] + [(out, sigmas[-1])]
    assert len(states) == steps + 1
    for x_t, sigma in states:
        mean, std = marginal(schedule, sigma)
        assert abs(float(x_t.mean()) - mean) < 5 * std / math.sqrt(x_t.numel())
        assert abs(float(x_t.std()) - std) < 5 * std / math.sqrt(2 * x_t.numel())


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_gaussian_without_gamma_follows_the_exact_trajectory(ladder, steps: int) -> None:
    schedule, sigmas = ladder(steps)
    x = sigmas[0] * randn(2, 100)
    record = Recorder()
    out = sample_tcd(gaussian_network(schedule), x, sigmas, schedule=schedule, gamma=0.0, noise=no_noise, report=record)
    start = schedule.level(sigmas[0])
    for _, x_t, sigma, _ in record.steps:
        torch.testing.assert_close(x_t, gaussian_map(x, start, schedule.level(sigma)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, gaussian_map(x, start, schedule.level(sigmas[-1])), rtol=1e-6, atol=1e-6)


def test_multistep_consistency_is_what_gamma_one_does_on_a_flow() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    x, z = randn(2, 5), randn(2, 5, seed=9)
    out = sample_tcd(smooth, x, sigmas, schedule=FlowSchedule(), gamma=1.0, noise=lambda *_: z)
    zero = torch.zeros(())
    x_1 = 0.4 * smooth(x, sigmas[0], zero) + 0.6 * z
    x_2 = 0.8 * smooth(x_1, sigmas[1], zero) + 0.2 * z
    torch.testing.assert_close(out, x_2)


# The order of calls, and their arguments


@pytest.mark.parametrize("gamma", GAMMAS)
def test_order_of_a_step_and_what_the_network_gets(ladder, gamma: float) -> None:
    schedule, sigmas = ladder(3)
    events: list[tuple[str, float]] = []

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        events.append(("denoise", float(sigma)))
        events.append(("target", float(sigma_s)))
        return smooth(x, sigma, sigma_s)

    def noise(sigma_next: Tensor, like: Tensor) -> Tensor:
        events.append(("noise", float(sigma_next)))
        return torch.zeros_like(like)

    def report(i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
        events.append(("report", i))

    sample_tcd(denoise, randn(1, 4), sigmas, schedule=schedule, gamma=gamma, noise=noise, report=report)
    expected: list[tuple[str, float]] = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        target = float(schedule.target_sigma(sigma_next, gamma))
        expected += [("denoise", float(sigma)), ("target", target), ("report", i)]
        if gamma > 0 and sigma_next > 0:
            expected.append(("noise", float(sigma_next)))
    assert events == expected


@pytest.mark.parametrize("gamma", GAMMAS)
def test_report_gets_x0_and_its_tensors_stay_as_they_were(ladder, gamma: float) -> None:
    schedule, sigmas = ladder(4)
    record = Recorder()
    out = sample_tcd(
        smooth, 3 * randn(2, 3, 4, 4), sigmas, schedule=schedule, gamma=gamma, noise=seeded_noise(1), report=record
    )
    out += 1
    assert [i for i, *_ in record.steps] == [0, 1, 2, 3]
    for (_, x, sigma, x0), (x_then, x0_then), sigma_given in zip(record.steps, record.copies, sigmas, strict=False):
        assert torch.equal(x, x_then)
        assert torch.equal(x0, x0_then)
        assert sigma == sigma_given
        assert torch.equal(x0, smooth(x, sigma, sigma))


def test_a_schedule_need_not_end_at_zero() -> None:
    schedule, sigmas = LADDERS["edm"](4)
    x, record = randn(1, 6), Recorder()
    sample_tcd(smooth, x, sigmas, schedule=schedule, gamma=0.3, noise=seeded_noise(1), report=record)
    out = sample_tcd(smooth, x, sigmas[:3], schedule=schedule, gamma=0.3, noise=seeded_noise(1))
    assert torch.equal(out, record.steps[2][1])


def test_a_level_given_twice_is_harmless() -> None:
    sigmas = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0])
    for gamma in GAMMAS:
        out = sample_tcd(smooth, randn(1, 6), sigmas, schedule=FlowSchedule(), gamma=gamma, noise=seeded_noise(1))
        assert out.isfinite().all()
    once = sample_tcd(smooth, randn(1, 6), sigmas[[0, 2, 4]], schedule=FlowSchedule(), gamma=0.0, noise=no_noise)
    twice = sample_tcd(smooth, randn(1, 6), sigmas, schedule=FlowSchedule(), gamma=0.0, noise=no_noise)
    torch.testing.assert_close(once, twice)


# Splits, batches, devices, dtypes


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_split_schedule_is_the_whole_one(ladder, gamma: float) -> None:
    schedule, sigmas = ladder(4)

    def run(x: Tensor, sigmas: Tensor) -> Tensor:
        return sample_tcd(smooth, x, sigmas, schedule=schedule, gamma=gamma, noise=seeded_noise(7))

    x = sigmas[0] * randn(2, 3, 4, 4)
    whole = run(x, sigmas)
    for k in range(len(sigmas)):
        assert torch.equal(run(run(x, sigmas[: k + 1]), sigmas[k:]), whole), k


@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_item_depends_on_neither_its_neighbors_nor_the_size_of_the_batch(ladder, gamma: float) -> None:
    schedule, sigmas = ladder(4)

    def run(x: Tensor, items: Sequence[int] | None = None) -> Tensor:
        noise = seeded_noise(7, items=items)
        return sample_tcd(smooth, x, sigmas, schedule=schedule, gamma=gamma, noise=noise)

    x = sigmas[0] * randn(3, 4, 5, 6)
    whole = run(x)
    for k in range(3):
        torch.testing.assert_close(run(x[k : k + 1], [k])[0], whole[k], rtol=1e-9, atol=1e-9)
    others = x.clone()
    others[[0, 2]] = others[[2, 0]]
    torch.testing.assert_close(run(others)[1], whole[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_only_the_form_of_the_ends(ladder, dtype: torch.dtype, gamma: float) -> None:
    schedule, sigmas = ladder(4)
    x = randn(2, 3, 4, 4).to(dtype)
    seen: list[torch.dtype] = []

    def run(x: Tensor, output_dtype: torch.dtype) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
            seen.append(x.dtype)
            return smooth(x, sigma, sigma_s).to(dtype).to(output_dtype)

        return sample_tcd(denoise, x, sigmas.float(), schedule=schedule, gamma=gamma, noise=seeded_noise(1))

    out = run(x, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, run(x.float(), torch.float32).to(dtype))
    assert set(seen) == {torch.float32}


def test_double_precision_is_kept() -> None:
    schedule, sigmas = LADDERS["discrete"](4)
    x = randn(2, 3)
    out = sample_tcd(smooth, x, sigmas, schedule=schedule, gamma=0.3, noise=seeded_noise(1))
    single = sample_tcd(smooth, x.float(), sigmas, schedule=schedule, gamma=0.3, noise=seeded_noise(1))
    assert out.dtype == torch.float64
    assert not torch.equal(out, single.double())
    torch.testing.assert_close(out, single.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sigma_dtype", [torch.float16, torch.bfloat16])
def test_sigmas_of_low_precision_are_not_computed_with_in_it(sigma_dtype: torch.dtype) -> None:
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])  # exact in every dtype
    x = randn(2, 3)

    def run(sigmas: Tensor) -> Tensor:
        return sample_tcd(smooth, x, sigmas, schedule=FlowSchedule(), gamma=0.3, noise=seeded_noise(1))

    assert torch.equal(run(sigmas.to(sigma_dtype)), run(sigmas))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_latents_may_be_on_another_device_than_the_sigmas(ladder, gamma: float) -> None:
    schedule, sigmas = ladder(4)
    x = torch.empty(2, 3, 4, 4, device="meta")
    out = sample_tcd(lambda x, *_: 0.5 * x, x, sigmas, schedule=schedule, gamma=gamma, noise=seeded_noise(1))
    assert out.device == x.device
    assert out.shape == x.shape


@pytest.mark.parametrize("shape", [(1, 4), (2, 4, 3, 5), (2, 4, 2, 3, 5)])
def test_x_of_any_rank_is_left_as_it_is(shape: tuple[int, ...]) -> None:
    schedule, sigmas = LADDERS["discrete"](4)
    x = randn(*shape, dtype=torch.float32)
    before = x.clone()
    out = sample_tcd(smooth, x, sigmas, schedule=schedule, gamma=0.3, noise=seeded_noise(1))
    assert torch.equal(x, before)
    assert out.shape == x.shape


# What is refused, and what is nothing to do


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 4])
def test_gamma_out_of_range_is_refused(gamma: float, steps: int) -> None:
    sigmas = torch.linspace(1, 0, steps + 1)
    with pytest.raises(ValueError, match=f"gamma is {gamma}, but must be from 0.0 to 1.0"):
        sample_tcd(smooth, randn(1, 4), sigmas, schedule=FlowSchedule(), gamma=gamma, noise=no_noise)


@pytest.mark.parametrize(
    "sigmas", [[0.0, 1.0], [1.0, math.nan], [math.inf, 0.0], [1.0, -0.1], [[1.0, 0.0]], 1.0, [1.0, 0.2, 0.3]]
)
def test_sigmas_that_are_no_descending_list_are_refused(sigmas: object) -> None:
    with pytest.raises(ValueError, match="finite, descending levels"):
        sample_tcd(smooth, randn(1, 4), torch.tensor(sigmas), schedule=FlowSchedule(), gamma=0.3, noise=seeded_noise(0))


@pytest.mark.parametrize("sigmas", [[], [0.7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_returns_x(sigmas: list[float], dtype: torch.dtype) -> None:
    def never(*args: object) -> Tensor:
        raise AssertionError("the network was called")

    x = randn(2, 3, dtype=torch.float32).to(dtype)
    out = sample_tcd(never, x, torch.tensor(sigmas), schedule=FlowSchedule(), gamma=0.3, noise=no_noise)
    assert out.dtype == dtype
    assert torch.equal(out, x)


# The schedules satisfy the protocol that the sampler asks for


def test_schedules_are_schedules() -> None:
    schedules: list[Schedule] = [DiscreteSchedule(torch.tensor([1.0])), FlowSchedule(), ContinuousSchedule()]
    for schedule in schedules:
        assert isinstance(schedule.level(torch.tensor(0.5)), Level)
