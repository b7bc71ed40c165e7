"""The consistency distillation loss: one jump from t must end where a teacher's step and a shorter jump end.

Flows in: clean latents, noise, times.  Flows out: one scalar, float32, in the paper's (variance preserving) scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tcd import Level, add_noise, jump
from trainer.times import Times

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], integer timesteps [B], rows [B] of the batch they belong to) -> x0 [B, C, H, W]."""


def tcd_loss(
    student: Predict,
    teacher: Predict,
    x0: Tensor,
    eps: Tensor,
    times: Times,
    *,
    level: Callable[[Tensor], Level],
    huber_c: float,
) -> Tensor:
    """The loss d(f(x_t, t -> s), f(x_next, t_next -> s)) of arXiv 2402.19159, with a stop-gradient target.

    x0, eps: clean latents and noise [B, C, H, W], float32; level: of integer timesteps [B].
    """
    t, t_next, s = (level(time) for time in times)
    rows = torch.arange(len(x0), device=x0.device)
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        x_next = jump(x_t, teacher(x_t, times.t, rows), t, t_next)
        target = x_next.clone()  # the answer where s = t_next, since f(x, t -> t) = x
        far = rows[times.s < times.t_next]
        if len(far):
            near, goal = level(times.t_next[far]), level(times.s[far])
            target[far] = jump(x_next[far], student(x_next[far], times.t_next[far], far), near, goal)
    # Last, so that the activations kept for the gradient are alive alone.
    pred = jump(x_t, student(x_t, times.t, rows), t, s)
    return pseudo_huber(pred, target, huber_c)


def pseudo_huber(pred: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean over all elements of sqrt(d^2 + c^2) - c: |d| where it is far above c, d^2 / 2c where it is far below."""
    return ((pred - target).square() + c * c).sqrt().sub(c).mean()
