"""ComfyUI's VAEs: pictures to normalized latents, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..seam import LatentDistribution


class HostAutoencoder:
    """The host's VAE object, and the latent format of the model, which shifts and scales latents."""

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self.vae, self.latent_format = vae, latent_format

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W]; the host's VAEs return the mean of the posterior.

        One at a time: a VAE for videos would take a batch of pictures for the frames of one video.
        """
        pictures = rearrange(pixels, "b c h w -> b 1 h w c").float() / 255
        latents = torch.cat([self.vae.encode(picture) for picture in pictures]).float()
        return LatentDistribution(self.latent_format.process_in(latents), None)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents to pictures, uint8 [B, 3, H, W]; the frames of a video are side by side."""
        pictures = []
        for latent in self.latent_format.process_out(latents.float()).split(1):
            picture = self.vae.decode(latent)
            frames = picture[0] if picture.ndim == 5 else picture
            pictures.append(rearrange(frames, "f h w c -> c h (f w)"))
        return (torch.stack(pictures).clamp(0, 1) * 255).round().to(torch.uint8)

    def to(self, device: torch.device) -> HostAutoencoder:
        """Return the VAE; the host moves it to its device while it is used."""
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        yield from self.vae.first_stage_model.parameters()
