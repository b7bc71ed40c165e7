"""Sampling with a network in memory, by the same function as the ComfyUI nodes: conditioning -> latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sampling import sample_tcd, seeded_noise
from ..schedule import Schedule
from .settings import Distillable


class Guidance(NamedTuple):
    """Guidance while sampling."""

    uncond: Any
    """The empty caption or a negative prompt, B rows or one."""
    scale: float
    """Guidance scale; 1 is no guidance."""


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Draw unit noise, float32 [B, C, ...], as ComfyUI does: the whole batch from one seeded CPU generator."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_latents(
    model: Distillable,
    cond: Any,
    *,
    sigmas: Tensor,
    gamma: float,
    noise: Tensor,
    seed: int,
    guidance: Guidance | None = None,
) -> Tensor:
    """Sample normalized latents [B, C, ...] by TCD, with the adapter in its current state.

    cond: B rows; sigmas: [N + 1] in the sampling scale, from model.schedule.sigmas_for or sigmas_at; gamma: amount of
    fresh noise per step, where 0 is DDIM; noise: initial unit noise [B, C, ...]; seed: of the fresh noise.
    """
    schedule, device = model.schedule, model.device

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        """Predict x0 from x in the sampling scale."""
        t, s = (schedule.point_at(each.expand(len(x)).to(device), x.ndim) for each in (sigma, sigma_s))
        x_t = x * _to_training_scale(schedule, sigma)
        if guidance is None:
            return model.x0(x_t, t, cond, s)
        scale = torch.full((len(x),), guidance.scale, device=device)
        return model.guided_x0(x_t, t, cond, guidance.uncond, scale, s)

    return sample_tcd(
        denoise,
        noise.to(device) * _noise_scale(schedule, sigmas[0]),
        sigmas,
        schedule=schedule,
        gamma=gamma,
        noise=seeded_noise(seed),
    )


def _to_training_scale(schedule: Schedule, sigma: Tensor) -> float:
    """Return the factor from the sampling scale to the training scale, at sigma > 0."""
    sampling, training = schedule.level(sigma), schedule.point_at(sigma.view(1)).level
    if training.alpha == 0:  # no signal: at zero terminal SNR, and at the start of a flow
        return float(training.sigma / sampling.sigma)
    return float(training.alpha / sampling.alpha)


def _noise_scale(schedule: Schedule, sigma: Tensor) -> float:
    """Return the factor from unit noise to the initial x in the sampling scale, as in ComfyUI.

    At the highest sigma, the initial x is unit noise in the training scale; below it, x = sigma eps.
    """
    if sigma >= schedule.sigmas_for(1)[0]:
        return 1 / _to_training_scale(schedule, sigma)
    return float(schedule.level(sigma).sigma)
