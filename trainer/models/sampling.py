"""The trainer's own sampling: captions to latents to pictures, through the very loop that the nodes run.

Flows in: a `Network` and what it is told.  Flows out: scaled latents, and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...tcd import DiscreteSchedule, sample_tcd, seeded_noise, sigma_to_alpha_bar
from .conditioning import Conditioning
from .unet.network import Network


class Guidance(NamedTuple):
    """Classifier-free guidance: the empty caption, one row or as many as there are, and the scale, where 1 is none."""

    uncond: Conditioning
    scale: float


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit noise [B, C, h, w] float32 for a whole batch, as ComfyUI draws it: one CPU stream, seeded."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_latents(
    network: Network,
    cond: Conditioning,
    *,
    timesteps: Sequence[int],
    gamma: float,
    noise: Tensor,
    seed: int,
    guidance: Guidance | None = None,
) -> Tensor:
    """Sample scaled latents [B, 4, h, w] for captions, B rows, with the steps `timesteps`, descending.

    noise: unit noise [B, 4, h, w] to begin with; seed: of the noise that gamma adds.  gamma = 0 is DDIM.
    """
    schedule = DiscreteSchedule.from_alpha_bar(network.alpha_bar.cpu().double())
    sigmas = torch.cat([schedule.sigma(torch.tensor(list(timesteps))), torch.zeros(1, dtype=torch.float64)])

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        """The network in the sampler's scale, x = x0 + sigma eps."""
        x_t = x * sigma_to_alpha_bar(sigma).sqrt()
        t, s = (schedule.timestep(each).to(x.device).expand(len(x)) for each in (sigma, sigma_s))
        if guidance is None:
            return network.x0(x_t, t, cond, s)
        scale = torch.full((len(x),), guidance.scale, device=x.device)
        return network.guided_x0(x_t, t, cond, guidance.uncond, scale, s)

    return sample_tcd(
        denoise,
        noise.to(cond.context.device) * _start_scale(sigmas[0], schedule),
        sigmas,
        schedule=schedule,
        gamma=gamma,
        noise=seeded_noise(seed),
    )


def _start_scale(sigma: Tensor, schedule: DiscreteSchedule) -> float:
    """The standard deviation of the first x: at the top of the schedule x_t is pure noise, below it is x0 + noise."""
    variance = sigma**2 + 1 if sigma >= schedule.sigmas[-1] else sigma**2
    return float(variance.sqrt())


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures, uint8 [B, 3, H, W], of scaled latents [B, 4, h, w]."""
    parts = [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(16)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
