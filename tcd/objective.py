"""The consistency distillation loss: a jump from t to s must agree with a teacher's step followed by a jump to s.

The teacher's step goes from t to t_next. Inputs are clean latents, noise, and the levels and network times at t, t_next
and s. The result is one distance for each example, [B], float32, in the training scale (variance preserving, or a
rectified flow's own).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .schedule import TimePoint
from .times import Points
from .trajectory import add_noise, jump

Predict = Callable[[Tensor, TimePoint, TimePoint], Tensor]
"""(x_t [B, C, ...], t, s) -> x0 [B, C, ...]; s may be ignored."""

Follow = Callable[[Tensor, TimePoint, TimePoint], Tensor]
"""f(x_t, t -> s) of arXiv 2402.19159: (x_t [B, C, ...], t, s) -> x_s [B, C, ...]."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both [B, C, ...] -> their distance, [B]."""

Weighting = Literal["none", "gap", "x0"]


def tcd_loss(
    student: Follow,
    target: Follow,
    teacher: Predict,
    x0: Tensor,
    eps: Tensor,
    points: Points,
    *,
    target_rows: Tensor,
    distance: Distance,
) -> Tensor:
    """Return the distances [B] between f(x_t, t -> s) and f(x_next, t_next -> s) of arXiv 2402.19159.

    student, target: the two f; only `student` gets a gradient. teacher: predicts x0 at x_t, for the solver step to
    x_next; its argument s is t_next. x0, eps: clean latents and noise [B, C, ...], float32. points: the levels must
    broadcast over x0. target_rows: the rows with s < t_next, int64 [b] on the device of x0 (`Times.target_rows`).
    `target` is called only for these rows, and not at all if there are none.
    """
    t, t_next, s = points
    x_t = add_noise(x0, eps, t.level)
    with torch.no_grad():
        x_next = jump(x_t, teacher(x_t, t, t_next), t.level, t_next.level)
        goal = x_next  # correct for rows with s = t_next, because f(x, t -> t) = x
        if len(target_rows):
            among = points.rows(target_rows)
            ends = target(x_next.index_select(0, target_rows), among.t_next, among.s)
            goal = x_next.index_copy(0, target_rows, ends.to(x_next.dtype))
    # The student runs last, so that its activations are not in memory together with those of the other two.
    return distance(student(x_t, t, s), goal)


def first_order(predict: Predict) -> Follow:
    """Return TCF(1) of arXiv 2402.19159: jump with the x0 predicted at (x_t, t). It is TCF(S+) if `predict` uses s."""

    def follow(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        return jump(x_t, predict(x_t, t, s), t.level, s.level)

    return follow


def second_order(predict: Predict, midpoint: Callable[[TimePoint, TimePoint], TimePoint]) -> Follow:
    """Return TCF(2) of arXiv 2402.19159: jump to the midpoint u, predict x0 there, and jump from t to s with it.

    midpoint: (t, s) -> u, halfway between them in half-log-SNR (`Schedule.midpoint` gives the time).
    """

    def follow(x_t: Tensor, t: TimePoint, s: TimePoint) -> Tensor:
        u = midpoint(t, s)
        x_u = jump(x_t, predict(x_t, t, s), t.level, u.level)
        # From x_t, not from x_u: the first jump only serves to find the better x0.
        return jump(x_t, predict(x_u, u, s), t.level, s.level)

    return follow


def loss_weights(points: Points, weighting: Weighting) -> Tensor:
    """Return the factor of each example's distance in the loss, [B].

    none: 1.
    gap: (t - t_next) / (t - s) in training times, because a jump's error accumulates over (t - s) / (t - t_next) solver
    steps (the weighting of consistency training, arXiv 2303.01469, in discrete time).
    x0: the inverse of x0's coefficient in the jump, alpha_s - alpha_t sigma_s / sigma_t, so that an error of x0 has the
    same effect on the loss for every length of the jump.
    It is infinite where s has the level of t, as at the lowest times of a distilled model.
    """
    t, t_next, s = points
    if weighting == "none":
        return torch.ones(len(t.time), device=t.time.device)
    if weighting == "gap":
        return (t.time - t_next.time) / (t.time - s.time)
    share = s.level.alpha - t.level.alpha * s.level.sigma / t.level.sigma
    return 1 / torch.as_tensor(share).flatten()


def huber(pred: Tensor, target: Tensor, *, c: float) -> Tensor:
    """Return the mean over elements of sqrt(d^2 + c^2) - c, [B], of pred and target [B, C, ...]; d is their difference.

    It is about |d| - c for |d| >> c, and d^2 / 2c for |d| << c: the pseudo-Huber distance of arXiv 2310.14189, applied
    to each element.
    """
    return ((pred - target).square() + c * c).sqrt().sub(c).flatten(1).mean(1)


def huber_of_sample(pred: Tensor, target: Tensor, *, c: float) -> Tensor:
    """Return sqrt(m + c^2) - c, [B], of pred and target [B, C, ...]; m is an example's mean squared difference.

    This is the pseudo-Huber distance of arXiv 2310.14189, up to the scale of m. Outliers within an example are not
    damped.
    """
    return ((pred - target).square().flatten(1).mean(1) + c * c).sqrt().sub(c)


def l2(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference over elements, [B], of pred and target [B, C, ...]."""
    return (pred - target).square().flatten(1).mean(1)


DistanceName = Literal["huber", "huber_sample", "l2"]


def distance_of(name: DistanceName, huber_c: float) -> Distance:
    """Return the distance with this name; `huber_c` is the c of the pseudo-Huber distances."""
    if name == "l2":
        return l2
    return partial(huber if name == "huber" else huber_of_sample, c=huber_c)
