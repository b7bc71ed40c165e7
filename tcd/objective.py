"""The consistency distillation loss: one jump from t must end where a teacher's step and a shorter jump end.

Flows in: clean latents, noise, and the points of the three times on any clock.  Flows out: a distance for each example,
[B], float32, in the scale of training (variance preserving, or that of a rectified flow).
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

Predict = Callable[[Tensor, TimePoint, TimePoint, Tensor], Tensor]
"""(x_t [B, C, ...], t, s, rows [B], int64, of the batch that they belong to) -> x0 [B, C, ...]; it may ignore s."""

Follow = Callable[[Tensor, TimePoint, TimePoint, Tensor], Tensor]
"""f(x_t, t -> s) of arXiv 2402.19159: (x_t [B, C, ...], t, s, rows [B]) -> x_s [B, C, ...]."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both [B, C, ...] -> how far they are apart, [B]."""

Weighting = Literal["none", "gap", "x0"]


def tcd_loss(
    student: Follow,
    target: Follow,
    teacher: Predict,
    x0: Tensor,
    eps: Tensor,
    points: Points,
    *,
    moved: Tensor,
    distance: Distance,
) -> Tensor:
    """The distances [B] from f(x_t, t -> s) to f(x_next, t_next -> s) of arXiv 2402.19159; the second has no gradient.

    x0, eps: clean latents and noise [B, C, ...], float32. points: of B examples, their levels broadcast over x0. moved:
    the rows with s < t_next, int64 [b] on the device of x0 (`Times.moved`); `target` is called for these alone, and
    not at all without any. `teacher` is given t_next as the time where its step ends.
    """
    t, t_next, s = points
    rows = torch.arange(len(x0), device=x0.device)
    x_t = add_noise(x0, eps, t.level)
    with torch.no_grad():
        x_next = jump(x_t, teacher(x_t, t, t_next, rows), t.level, t_next.level)
        goal = x_next  # the answer where s = t_next, since f(x, t -> t) = x
        if len(moved):
            among = points.rows(moved)
            ends = target(x_next.index_select(0, moved), among.t_next, among.s, moved)
            goal = x_next.index_copy(0, moved, ends.to(x_next.dtype))
    # Last, so that the activations kept for the gradient are alive alone.
    return distance(student(x_t, t, s, rows), goal)


def first_order(predict: Predict) -> Follow:
    """TCF(1) of arXiv 2402.19159: one jump by the prediction at (x_t, t); TCF(S+) where that heeds s."""

    def follow(x_t: Tensor, t: TimePoint, s: TimePoint, rows: Tensor) -> Tensor:
        return jump(x_t, predict(x_t, t, s, rows), t.level, s.level)

    return follow


def second_order(predict: Predict, midpoint: Callable[[TimePoint, TimePoint], TimePoint]) -> Follow:
    """TCF(2) of arXiv 2402.19159: a jump by the prediction half way, in half-log-SNR, where a first jump has led.

    midpoint: (t, s) -> the points half way between them (`Schedule.midpoint` gives their times).
    """

    def follow(x_t: Tensor, t: TimePoint, s: TimePoint, rows: Tensor) -> Tensor:
        u = midpoint(t, s)
        x_u = jump(x_t, predict(x_t, t, s, rows), t.level, u.level)
        # The trajectory through x_t whose clean end is the prediction at u.
        return jump(x_t, predict(x_u, u, s, rows), t.level, s.level)

    return follow


def weights(points: Points, weighting: Weighting) -> Tensor:
    """What each example's distance counts, [B].

    none: 1. gap: (t - t_next) / (t - s) in training times, as the error of a jump is the sum of those of so many steps
    (the weighting of consistency training, arXiv 2303.01469, in discrete time). x0: the inverse of the weight that x0
    has in the jump, alpha_s - alpha_t sigma_s / sigma_t, so that an error of x0 counts the same wherever the jump goes.
    It is infinite where s has the level of t, as the lowest times of a distilled model have.
    """
    t, t_next, s = points
    if weighting == "none":
        return torch.ones(len(t.time), device=t.time.device)
    if weighting == "gap":
        return (t.time - t_next.time) / (t.time - s.time)
    share = s.level.alpha - t.level.alpha * s.level.sigma / t.level.sigma
    return 1 / torch.as_tensor(share).flatten()


def huber(pred: Tensor, target: Tensor, *, c: float) -> Tensor:
    """Mean over elements of sqrt(d^2 + c^2) - c, [B]: |d| where it is far above c, d^2 / 2c where it is far below."""
    return ((pred - target).square() + c * c).sqrt().sub(c).flatten(1).mean(1)


def huber_of_sample(pred: Tensor, target: Tensor, *, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, [B], with d^2 the mean square over an example: its outliers count as in the mean square."""
    return ((pred - target).square().flatten(1).mean(1) + c * c).sqrt().sub(c)


def l2(pred: Tensor, target: Tensor) -> Tensor:
    """Mean square over elements, [B]."""
    return (pred - target).square().flatten(1).mean(1)


DistanceName = Literal["huber", "huber_sample", "l2"]


def distance_of(name: DistanceName, huber_c: float) -> Distance:
    """Return the distance of that name."""
    if name == "l2":
        return l2
    return partial(huber if name == "huber" else huber_of_sample, c=huber_c)
