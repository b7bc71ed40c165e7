"""Latents that the teacher draws itself, from conditioning alone, by DPM-Solver++(2M) (arXiv 2211.01095)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tcd import Level, jump
from ...tcd.timesteps import ORIGIN_STEPS
from .conditioning import Conditioning
from .seam import Model


@torch.no_grad()
def draw_latents(
    model: Model, cond: Conditioning, uncond: Conditioning, noise: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Draw latents [B, C, ...] from unit noise of that shape; the solver adds none.

    steps: at most 50, on the grid on which students are distilled; the last ends at x0 itself.  guidance: its scale,
    where 1 is none.

    A step of the solver is a jump along the trajectory whose clean end is not x0 as estimated here, but as extrapolated
    to half a step later: D = x0 + (x0 - x0_before) h / (2 h_before), where h is the length of a step in half-log-SNR.
    """
    times = model.schedule.visited(steps, origin_steps=ORIGIN_STEPS)
    points = [model.schedule.point(torch.full((len(noise),), t, device=noise.device), noise.ndim) for t in times]
    scale = torch.full((len(noise),), guidance, device=noise.device)
    x = noise
    before: tuple[Tensor, Tensor] | None = None
    for t, s in zip(points, points[1:], strict=False):
        x0 = model.guided_x0(x, t, cond, uncond, scale)
        h = _half_log_snr(s.level) - _half_log_snr(t.level)
        ahead = x0
        if before is not None:
            x0_before, h_before = before
            ahead = x0 + (x0 - x0_before) * (h / (2 * h_before))
        x, before = jump(x, ahead, t.level, s.level), (x0, h)
    return model.guided_x0(x, points[-1], cond, uncond, scale)


def _half_log_snr(level: Level) -> Tensor:
    return torch.log(torch.as_tensor(level.alpha) / level.sigma)
