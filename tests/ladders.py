"""The kinds of schedule that sampling and training must serve; for sampling, each with a way to choose N steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from trajectory_consistency.tcd import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    scaled_linear_alpha_bar,
    timestep_grid,
    zero_terminal_snr,
)

Ladder = tuple[Schedule, Tensor]

CLOCKS: dict[str, Schedule] = {
    "discrete": DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()),
    "zero_snr": DiscreteSchedule.from_alpha_bar(zero_terminal_snr(scaled_linear_alpha_bar())),
    "flow": FlowSchedule(),
    "flow_shifted": FlowSchedule(lambda u: 3 * u / (1 + 2 * u)),
    "edm": ContinuousSchedule(80.0),
}
DISCRETE = ("discrete", "zero_snr")

GAMMAS = [0.0, 0.3, 1.0]


def _discrete(alpha_bar: Tensor, steps: int) -> Ladder:
    schedule = DiscreteSchedule.from_alpha_bar(alpha_bar)
    return schedule, _append_zero(schedule.sigma(torch.tensor(timestep_grid(steps))))


def _flow(steps: int) -> Ladder:
    return FlowSchedule(), torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _edm(steps: int) -> Ladder:
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps + 1, dtype=torch.float64)[:steps] ** 7
    return ContinuousSchedule(), _append_zero(ramp)


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


LADDERS: dict[str, Callable[[int], Ladder]] = {
    "discrete": lambda steps: _discrete(scaled_linear_alpha_bar(), steps),
    "zero_snr": lambda steps: _discrete(zero_terminal_snr(scaled_linear_alpha_bar()), steps),
    "flow": _flow,
    "edm": _edm,
}
