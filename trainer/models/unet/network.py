"""A UNet as what the equations ask for: a function from (x_t, t, conditioning) to its estimate of x0.

Flows in: noisy latents in the paper's (variance preserving) scale and integer timesteps.  Flows out: x0 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ....tcd import Level, Prediction, sigma_to_alpha_bar, to_x0, vp_level
from ....tcd.schedule import TERMINAL_SIGMA
from ..conditioning import Conditioning


@dataclass(frozen=True)
class Network:
    """A UNet with the schedule it lives on: student and teacher are the same one, with its adapter on or off."""

    unet: UNet2DConditionModel
    alpha_bar: Tensor
    """[T] float32 on the UNet's device, by integer training timestep."""
    prediction: Prediction

    def level(self, timesteps: Tensor) -> Level:
        """The noise level, [B, 1, 1, 1] float32, of timesteps [B]; of fractions, half-log-SNR is interpolated."""
        if not timesteps.is_floating_point():
            return vp_level(self.alpha_bar[timesteps].view(-1, 1, 1, 1))
        below, log_snr = timesteps.long().clamp(max=len(self.alpha_bar) - 2), self._log_snr()
        between = torch.lerp(log_snr[below], log_snr[below + 1], timesteps - below)
        return vp_level(between.sigmoid().view(-1, 1, 1, 1))

    def midpoint(self, t: Tensor, s: Tensor) -> Tensor:
        """The timesteps [B], fractions too, half way in half-log-SNR between integer timesteps t and s, both [B]."""
        log_snr = self._log_snr()
        middle = (log_snr[t] + log_snr[s]) / 2
        above = torch.searchsorted(-log_snr, -middle).clamp(min=1)
        low, high = log_snr[above - 1], log_snr[above]
        return above - 1 + (middle - low) / (high - low)

    def x0(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning, s: Tensor | None = None) -> Tensor:
        """Estimate x0 [B, C, H, W] from x_t [B, C, H, W] at timesteps [B], fractions too, given captions, B rows.

        s: the target timesteps [B], of which a UNet is told that has an embedding of them (TCF(S+)).
        """
        return to_x0(self._output(x_t, timesteps, cond, s), x_t, self.level(timesteps), self.prediction)

    def guided_x0(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: Tensor | None = None,
    ) -> Tensor:
        """Estimate x0 as `x0` does, with classifier-free guidance u + w (c - u), both halves in one batched call.

        uncond: the empty caption, one row or, with the time_ids of each example, B of them; guidance: w, [B].
        """
        both, twice = Conditioning.cat([cond, uncond.expand(len(cond))]), torch.cat([timesteps, timesteps])
        output = self._output(torch.cat([x_t, x_t]), twice, both, None if s is None else torch.cat([s, s]))
        given, free = output.chunk(2)
        output = free + guidance.view(-1, 1, 1, 1) * (given - free)
        return to_x0(output, x_t, self.level(timesteps), self.prediction)

    def _log_snr(self) -> Tensor:
        """Of each integer timestep, [T]; where there is no signal at all, that of the finite stand-in for its sigma."""
        return torch.logit(self.alpha_bar.clamp(min=sigma_to_alpha_bar(torch.tensor(TERMINAL_SIGMA)).item()))

    def _output(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning, s: Tensor | None) -> Tensor:
        """The raw prediction in float32; the UNet alone sees its own dtype."""
        dtype = self.unet.dtype
        added = None
        if cond.pooled is not None:
            # The sizes stay in float32: bfloat16 has no 1000.
            added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}
        # diffusers adds an embedding of class labels to that of t: where `adapter` puts the one of the target time.
        times = None if s is None else torch.stack([timesteps, s], dim=-1)
        output: Tensor = self.unet(
            x_t.to(dtype), timesteps, cond.context.to(dtype), class_labels=times, added_cond_kwargs=added
        ).sample
        return output.float()
