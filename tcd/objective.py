"""The consistency distillation loss: one jump from t must end where a teacher's step and a shorter jump end.

Flows in: clean latents, noise, times.  Flows out: one scalar, float32, in the paper's (variance preserving) scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from . import Level, add_noise, jump
from .times import Times

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], training timesteps [B], rows [B] of the batch they belong to) -> x0 [B, C, H, W]."""

Told = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B], s [B], rows [B]) -> x0 [B, C, H, W]: a prediction that may heed where the jump ends."""

Follow = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""f(x_t, t -> s) of arXiv 2402.19159: (x_t [B, C, H, W], t [B], s [B], rows [B]) -> x_s [B, C, H, W]."""

Levels = Callable[[Tensor], Level]
"""Training timesteps [B], also between two, -> their noise level, [B, 1, 1, 1]."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target), both [B, C, H, W] -> how far they are apart, [B]."""

Weighting = Literal["none", "gap", "x0"]


def tcd_loss(
    student: Follow,
    target: Follow,
    teacher: Predict,
    x0: Tensor,
    eps: Tensor,
    times: Times,
    *,
    level: Levels,
    distance: Distance,
) -> Tensor:
    """The distances [B] from f(x_t, t -> s) to f(x_next, t_next -> s) of arXiv 2402.19159; the second has no gradient.

    x0, eps: clean latents and noise [B, C, H, W], float32.
    """
    rows = torch.arange(len(x0), device=x0.device)
    x_t = add_noise(x0, eps, level(times.t))
    with torch.no_grad():
        x_next = jump(x_t, teacher(x_t, times.t, rows), level(times.t), level(times.t_next))
        goal = x_next.clone()  # the answer where s = t_next, since f(x, t -> t) = x
        far = rows[times.s < times.t_next]
        if len(far):
            goal[far] = target(x_next[far], times.t_next[far], times.s[far], far)
    # Last, so that the activations kept for the gradient are alive alone.
    return distance(student(x_t, times.t, times.s, rows), goal)


def first_order(predict: Told, level: Levels) -> Follow:
    """TCF(1) of arXiv 2402.19159: one jump by the prediction at (x_t, t); TCF(S+) where that heeds s."""

    def follow(x_t: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        return jump(x_t, predict(x_t, t, s, rows), level(t), level(s))

    return follow


def second_order(predict: Told, level: Levels, midpoint: Callable[[Tensor, Tensor], Tensor]) -> Follow:
    """TCF(2) of arXiv 2402.19159: a jump by the prediction half way, in half-log-SNR, where a first jump has led.

    midpoint: (t [B], s [B]) -> the timesteps [B], fractions too, half way between them.
    """

    def follow(x_t: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        u = midpoint(t, s)
        x_u = jump(x_t, predict(x_t, t, s, rows), level(t), level(u))
        # The trajectory through x_t whose clean end is the prediction at u.
        return jump(x_t, predict(x_u, u, s, rows), level(t), level(s))

    return follow


def weights(times: Times, level: Levels, weighting: Weighting) -> Tensor:
    """What each example's distance counts, [B].

    none: 1. gap: (t - t_next) / (t - s), as the error of a jump is the sum of those of so many steps (the weighting of
    consistency training, arXiv 2303.01469, in discrete time). x0: the inverse of the weight that x0 has in the jump,
    alpha_s - alpha_t sigma_s / sigma_t, so that an error of x0 counts the same wherever the jump goes.
    """
    if weighting == "none":
        return torch.ones(len(times.t), device=times.t.device)
    if weighting == "gap":
        return (times.t - times.t_next) / (times.t - times.s)
    t, s = level(times.t), level(times.s)
    return 1 / torch.as_tensor(s.alpha - t.alpha * s.sigma / t.sigma).flatten()


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
