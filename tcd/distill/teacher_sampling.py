"""Sampling with the guided teacher by DPM-Solver++(2M) (arXiv 2211.01095), for training without pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..timesteps import ORIGIN_STEPS
from ..trajectory import Level, jump
from .settings import Distillable


@torch.no_grad()
def dpm_solver_sample(
    model: Distillable, cond: Any, uncond: Any, noise: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Sample latents [B, C, ...] from unit noise of the same shape; the solver is deterministic.

    steps: number of calls of the teacher, at the times of model.schedule.sampler_times; the last one returns x0.
    guidance: scale of all rows; 1 is no guidance. Raises ValueError if sampler_times does.

    Each step from t to s is a jump along the trajectory, with x0 extrapolated to the middle of the step:
    D = x0 + (x0 - x0_previous) h / (2 h_previous), where h is the length of a step in half-log-SNR.
    """
    times = model.schedule.sampler_times(steps, origin_steps=ORIGIN_STEPS)
    points = [model.schedule.point(torch.full((len(noise),), t, device=noise.device), noise.ndim) for t in times]
    scale = torch.full((len(noise),), guidance, device=noise.device)
    x = noise
    previous: tuple[Tensor, Tensor] | None = None
    for t, s in zip(points, points[1:], strict=False):
        x0 = model.guided_x0(x, t, cond, uncond, scale)
        h = _half_log_snr(s.level) - _half_log_snr(t.level)
        extrapolated = x0
        if previous is not None:
            x0_previous, h_previous = previous
            extrapolated = x0 + (x0 - x0_previous) * (h / (2 * h_previous))
        x, previous = jump(x, extrapolated, t.level, s.level), (x0, h)
    return model.guided_x0(x, points[-1], cond, uncond, scale)


def _half_log_snr(level: Level) -> Tensor:
    return torch.log(torch.as_tensor(level.alpha) / level.sigma)
