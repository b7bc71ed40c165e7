"""The reference for the host's results: the same UNet in diffusers, sampled with diffusers' TCDScheduler."""

from collections.abc import Sequence
from unittest import mock

import torch
from diffusers import TCDScheduler, UNet2DConditionModel
from torch import Tensor

from trajectory_consistency.tcd import DiscreteSchedule, scaled_linear_alpha_bar, seeded_noise, zero_terminal_snr


def condition(seed: int = 0) -> Tensor:
    """Return the embedding [1, 77, 768] of TestConditioning."""
    return torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(seed))


def sigma_table(*, zero_snr: bool = False) -> Tensor:
    """Return the host's sigmas [1000] by timestep, float32; bit for bit equal, because noise is seeded by them."""
    alpha_bar = scaled_linear_alpha_bar()
    return DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar).sigmas.float()


@torch.no_grad()
def tcd_scheduler_sample(
    unet: UNet2DConditionModel,
    x: Tensor,
    timesteps: Sequence[int],
    *,
    eta: float,
    seed: int,
    prediction: str = "epsilon",
    zero_snr: bool = False,
    context: Tensor | None = None,
) -> Tensor:
    """Sample with diffusers' TCDScheduler from x [B, 4, h, w] at timesteps[0], in the variance preserving scale.

    The scheduler's injected noise is replaced by seeded_noise, and its last step by x0, with which the host ends.
    context: [1, 77, C], by default that of TestConditioning.
    """
    scheduler = TCDScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(timesteps=list(timesteps))
    draw = seeded_noise(seed)
    context = (condition() if context is None else context).expand(len(x), -1, -1)
    table = sigma_table(zero_snr=zero_snr)
    for i, t in enumerate(timesteps):
        output = unet(x, t, context).sample
        if i == len(timesteps) - 1:
            return _x0(scheduler, output, x, t)
        noise = draw(table[timesteps[i + 1]], x)
        with mock.patch("diffusers.schedulers.scheduling_tcd.randn_tensor", return_value=noise):
            x = scheduler.step(output, t, x, eta=eta).prev_sample
    return x


def _x0(scheduler: TCDScheduler, output: Tensor, x: Tensor, t: int) -> Tensor:
    alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    if scheduler.config.prediction_type == "sample":
        return output
    if scheduler.config.prediction_type == "v_prediction":
        return alpha * x - sigma * output
    return (x - sigma * output) / alpha
