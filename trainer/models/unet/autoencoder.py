"""Stable Diffusion's VAE, in float32 always: SDXL's overflows in float16, and each picture is encoded once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..seam import LatentDistribution

_TOGETHER = 16  # latents that are decoded in one call


class Vae:
    """A frozen VAE, and the factor that its latents are normalized by."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.scale: float = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W] on the VAE's device, to normalized latents [B, 4, H / 8, W / 8]."""
        posterior = self.vae.encode(pixels.float() / 127.5 - 1).latent_dist
        return LatentDistribution(posterior.mean * self.scale, posterior.std * self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, 4, h, w] to pictures, uint8 [B, 3, 8 h, 8 w]."""
        decoded = [self.vae.decode(part / self.scale).sample for part in latents.split(_TOGETHER)]
        return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def to(self, device: torch.device) -> Vae:
        """The same, moved to a device."""
        self.vae.to(device)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""
        return self.vae.parameters()
