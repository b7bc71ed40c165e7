"""Latents that the teacher draws itself, from captions alone.

Flows in: a network and what it is told.  Flows out: scaled latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tcd import Level, jump, timestep_grid
from .conditioning import Conditioning
from .unet.network import Network


@torch.no_grad()
def draw_latents(
    network: Network, cond: Conditioning, uncond: Conditioning, noise: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Draw latents [B, 4, h, w] from unit noise of that shape by DPM-Solver++(2M) (arXiv 2211.01095), which adds none.

    steps: of the grid on which students are distilled, at most 50; the last ends at x0 itself.  guidance: its scale,
    where 1 is none.

    The solver's step is a jump along the trajectory whose clean end is not x0 as estimated, but as it is going to be
    half a step later: D = x0 + (x0 - x0_before) h / (2 h_before), where h is the length of a step in half-log-SNR.
    """
    grid = timestep_grid(steps)
    times = [torch.full((len(noise),), t, device=noise.device) for t in grid]
    scale = torch.full((len(noise),), guidance, device=noise.device)
    x = noise
    passed: tuple[Tensor, Tensor] | None = None
    for t, s in zip(times, times[1:], strict=False):
        x0 = network.guided_x0(x, t, cond, uncond, scale)
        here, there = network.level(t), network.level(s)
        h = _half_log_snr(there) - _half_log_snr(here)
        ahead = x0
        if passed is not None:
            x0_before, h_before = passed
            ahead = x0 + (x0 - x0_before) * (h / (2 * h_before))
        x, passed = jump(x, ahead, here, there), (x0, h)
    return network.guided_x0(x, times[-1], cond, uncond, scale)


def _half_log_snr(level: Level) -> Tensor:
    return torch.log(torch.as_tensor(level.alpha) / level.sigma)
