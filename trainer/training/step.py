"""The loss of one step: what is random in it, and the student, its target and the teacher as one UNet in three states.

Flows in: a network with an adapter on it, and a batch.  Flows out: a loss for each picture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tcd.objective import distance_of, first_order, second_order, tcd_loss, weights
from ...tcd.times import Times, sample_times
from ..config.settings import Config
from ..data.dataset import Batch
from ..models.unet.adapter import adapters_off, averaged
from ..models.unet.network import Network
from ..randomness import generator


class Draws(NamedTuple):
    """All that is random in a step, but for what the dataset draws."""

    times: Times
    eps: Tensor
    """[B, 4, h, w]."""
    guidance: Tensor
    """[B]."""

    def of(self, rows: slice) -> Draws:
        """Those of some rows of the batch."""
        return Draws(Times(*(time[rows] for time in self.times)), self.eps[rows], self.guidance[rows])


def draw(config: Config, step: int, shape: torch.Size) -> Draws:
    """What is random in a step with latents of `shape` [4, h, w], for its whole batch: a function of (seed, step)."""
    method, size = config.method, config.training.batch
    source = generator(config.training.seed, "loss", step)
    times = sample_times(
        size,
        law=method.law,
        origin_steps=method.origin_steps,
        skip=method.skip,
        phases=method.phases[step * len(method.phases) // config.training.steps],
        generator=source,
    )
    eps = torch.randn((size, *shape), generator=source)
    low, high = method.guidance_min, method.guidance_max
    return Draws(times, eps, low + (high - low) * torch.rand(size, generator=source))


def step_losses(network: Network, batch: Batch, draws: Draws, config: Config) -> Tensor:
    """The weighted loss [B] of each picture of a batch."""
    method, device = config.method, network.alpha_bar.device
    guidance = draws.guidance.to(device)
    cond, uncond = batch.cond.to(device), batch.uncond.to(device)

    def predict(x_t: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        return network.x0(x_t, t, cond[rows], s)

    def teacher(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        with adapters_off(network.unet):
            return network.guided_x0(x_t, timesteps, cond[rows], uncond[rows], guidance[rows])

    student = first_order(predict, network.level)
    if method.order == 2:
        student = second_order(predict, network.level, network.midpoint)

    def average(x_t: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        with averaged(network.unet):
            return student(x_t, t, s, rows)

    times = Times(*(time.to(device) for time in draws.times))
    distances = tcd_loss(
        student,
        average if method.ema_decay else student,
        teacher,
        batch.latents.to(device),
        draws.eps.to(device),
        times,
        level=network.level,
        distance=distance_of(method.distance, method.huber_c),
    )
    return weights(times, network.level, method.weighting) * distances
