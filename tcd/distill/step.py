"""The loss of a training step. Student, EMA target and teacher are one network in three states of its adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import AVERAGE
from ..errors import UserError
from ..objective import Follow, distance_of, first_order, loss_weights, second_order, tcd_loss
from ..schedule import Schedule, TimePoint
from ..times import Points
from .examples import Examples
from .settings import Distillable, Method
from .sharded import is_sharded


def check_weighting(method: Method, schedule: Schedule) -> None:
    """Raise UserError if method.weighting could give a jump an infinite weight; `schedule` is on the CPU.

    The weighting "x0" divides by the coefficient of x0 in the jump. The coefficient is 0 between two times of the same
    level. A model that was distilled to every k-th timestep has such times: the k lowest ones.
    """
    lowest = schedule.grid(method.origin_steps)[:2]
    alpha, sigma = (torch.as_tensor(part) for part in schedule.point(lowest).level)
    if method.weighting == "x0" and alpha[0] == alpha[1] and sigma[0] == sigma[1]:
        raise UserError(
            f'method.weighting is "x0", but this model has one noise level for all times up to {int(lowest[1])}, which '
            "gives jumps between them an infinite weight: use another weighting, or fewer method.origin_steps"
        )


def step_losses(model: Distillable, examples: Examples[Any], method: Method) -> Tensor:
    """Return the weighted loss of each example, [b], with a gradient; the examples are on the model's device."""
    schedule, ndim = model.schedule, examples.latents.ndim

    def teacher(x_t: Tensor, t: TimePoint, _: TimePoint) -> Tensor:
        with model.adapter.off():
            return model.guided_x0(x_t, t, examples.cond, examples.uncond, examples.guidance)

    def student(cond: Any) -> Follow:
        def predict(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
            return model.x0(x_t, t, cond, s)

        if method.order == 2:
            return second_order(predict, lambda t, s: schedule.point(schedule.midpoint(t.time, s.time), ndim))
        return first_order(predict)

    def target(cond: Any) -> Follow:
        def follow(x_next: Tensor, t_next: TimePoint, s: TimePoint) -> Tensor:
            with model.adapter.using(AVERAGE if method.ema_decay else model.adapter.state):
                return student(cond)(x_next, t_next, s)

        return follow

    follow, target_rows = target(examples.target_cond), examples.target_rows
    if is_sharded(model.network):
        follow, target_rows = _for_all_rows(target(examples.cond), examples)
    points = Points(*(schedule.point(time, ndim) for time in examples.times))
    distances = tcd_loss(
        student(examples.cond),
        follow,
        teacher,
        examples.latents,
        examples.eps,
        points,
        target_rows=target_rows,
        distance=distance_of(method.distance, method.huber_c),
    )
    return loss_weights(points, method.weighting) * distances


def _for_all_rows(target: Follow, examples: Examples[Any]) -> tuple[Follow, Tensor]:
    """Return a target that is called for all rows, also those with s = t_next, where it is x_next; and these rows.

    How many rows have s < t_next differs between the processes, which must call a sharded network equally often.
    """
    needed = torch.zeros(len(examples.latents), dtype=torch.bool, device=examples.latents.device)
    needed[examples.target_rows] = True
    needed = needed.view(-1, *[1] * (examples.latents.ndim - 1))

    def follow(x_next: Tensor, t_next: TimePoint, s: TimePoint) -> Tensor:
        # Where sigma is 0 at t_next, target gives NaN.
        return torch.where(needed, target(x_next, t_next, s), x_next)

    return follow, torch.arange(len(needed), device=needed.device)
