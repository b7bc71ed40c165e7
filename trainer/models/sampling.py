"""The trainer's own sampling, through the loop that the nodes run: conditioning to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...tcd import Schedule, sample_tcd, seeded_noise
from .conditioning import Conditioning
from .seam import Model


class Guidance(NamedTuple):
    """Guidance while sampling: the empty caption, one row or as many as there are, and the scale, where 1 is none."""

    uncond: Conditioning
    scale: float


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit noise [B, C, ...] float32 for a whole batch, as ComfyUI draws it: one CPU stream, seeded."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_latents(
    model: Model,
    cond: Conditioning,
    *,
    sigmas: Tensor,
    gamma: float,
    noise: Tensor,
    seed: int,
    guidance: Guidance | None = None,
) -> Tensor:
    """Sample normalized latents [B, C, ...] for conditioning of B rows.

    sigmas: [N + 1], from model.schedule.sigmas_for or sigmas_at; noise: unit noise [B, C, ...] to begin with; seed: of
    the noise that gamma adds. gamma = 0 is DDIM.
    """
    schedule, device = model.schedule, model.device

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        """The model in the sampler's scale."""
        points = [schedule.point_at(each.expand(len(x)).to(device), x.ndim) for each in (sigma, sigma_s)]
        t, s = points
        x_t = x * _to_training_scale(schedule, sigma)
        if guidance is None:
            return model.x0(x_t, t, cond, s)
        scale = torch.full((len(x),), guidance.scale, device=device)
        return model.guided_x0(x_t, t, cond, guidance.uncond, scale, s)

    return sample_tcd(
        denoise,
        noise.to(device) * _start_scale(schedule, sigmas[0]),
        sigmas,
        schedule=schedule,
        gamma=gamma,
        noise=seeded_noise(seed),
    )


def _to_training_scale(schedule: Schedule, sigma: Tensor) -> float:
    """What x in the sampler's scale is multiplied by to be in the training scale, at sigma > 0."""
    here, there = schedule.level(sigma), schedule.point_at(sigma.view(1)).level
    if there.alpha == 0:  # no signal: at zero terminal SNR, and where a flow begins
        return float(there.sigma / here.sigma)
    return float(there.alpha / here.alpha)


def _start_scale(schedule: Schedule, sigma: Tensor) -> float:
    """What unit noise is multiplied by to be the first x; at the schedule's end it is the noise of the training scale.

    Below the end it is that of x = x0 + sigma eps without an x0, as ComfyUI has it.
    """
    if sigma >= schedule.sigmas_for(1)[0]:
        return 1 / _to_training_scale(schedule, sigma)
    return float(schedule.level(sigma).sigma)
