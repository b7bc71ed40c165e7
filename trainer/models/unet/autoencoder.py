"""Stable Diffusion's VAE, always in float32: SDXL's overflows in float16, and speed matters little for one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..seam import LatentDistribution

_DECODE_BATCH = 16


class Vae:
    """A frozen VAE whose latents are multiplied by its scaling factor."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.scale: float = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W] on the VAE's device; the normalized latents are [B, 4, H / 8, W / 8]."""
        posterior = self.vae.encode(pixels.float() / 127.5 - 1).latent_dist
        return LatentDistribution(posterior.mean * self.scale, posterior.std * self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, 4, h, w] to pictures, uint8 [B, 3, 8 h, 8 w]."""
        decoded = [self.vae.decode(part / self.scale).sample for part in latents.split(_DECODE_BATCH)]
        return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def to(self, device: torch.device) -> Vae:
        """Move the VAE to a device, and return it."""
        self.vae.to(device)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        return self.vae.parameters()
