"""A UNet as what the equations ask for: a function from (x_t, t, caption) to its estimate of x0.

Flows in: noisy latents in the paper's (variance preserving) scale and integer timesteps.  Flows out: x0 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tcd import Level, Prediction, to_x0, vp_level


@dataclass(frozen=True)
class Network:
    """A UNet with the schedule it lives on: student and teacher are the same one, with its adapter on or off."""

    unet: UNet2DConditionModel
    alpha_bar: Tensor
    """[T] float32 on the UNet's device, by integer training timestep."""
    prediction: Prediction

    def level(self, timesteps: Tensor) -> Level:
        """The noise level, [B, 1, 1, 1] float32, of integer timesteps [B]."""
        return vp_level(self.alpha_bar[timesteps].view(-1, 1, 1, 1))

    def x0(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Estimate x0 [B, C, H, W] from x_t [B, C, H, W] at integer timesteps [B], given captions [B, 77, D]."""
        return to_x0(self._output(x_t, timesteps, context), x_t, self.level(timesteps), self.prediction)

    def guided_x0(self, x_t: Tensor, timesteps: Tensor, context: Tensor, uncond: Tensor, guidance: Tensor) -> Tensor:
        """Estimate x0 with classifier-free guidance u + w (c - u), both halves in one batched call.

        uncond: [1, 77, D], the empty caption; guidance: w, [B].
        """
        both = torch.cat([context, uncond.expand_as(context)])
        cond, free = self._output(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        output = free + guidance.view(-1, 1, 1, 1) * (cond - free)
        return to_x0(output, x_t, self.level(timesteps), self.prediction)

    def _output(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The raw prediction in float32; the UNet alone sees its own dtype."""
        dtype = self.unet.dtype
        output: Tensor = self.unet(x_t.to(dtype), timesteps, context.to(dtype)).sample
        return output.float()
