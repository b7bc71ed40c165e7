"""ComfyUI's VAEs: pictures to normalized latents, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import UserError
from ..seam import LatentDistribution, LatentFormat


class HostAutoencoder:
    """The host's VAE object, and the latent format of the model, which shifts and scales latents."""

    def __init__(self, vae: Any, latent_format: Any) -> None:
        self.vae, self.latent_format, self.latents = vae, latent_format, latents_of(latent_format)

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W]; the host's VAEs return the mean of the posterior.

        One at a time: a VAE for videos would take a batch of pictures for the frames of one video. Pictures on the meta
        device only take the memory that the host expects to need.

        Raises UserError if the VAE is not that of the model, because its latents have another shape.
        """
        if pixels.is_meta:
            return LatentDistribution(self._encode_shapes(pixels), None)
        pictures = rearrange(pixels, "b c h w -> b 1 h w c").float() / 255
        latents = torch.cat([self._encode(picture) for picture in pictures]).float()
        return LatentDistribution(self.latent_format.process_in(latents), None)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents to pictures, uint8 [B, 3, H, W]; the frames of a video are side by side.

        Latents on the meta device only take the memory that the host expects to need.
        """
        if latents.is_meta:
            _take(self.vae.memory_used_decode(latents[:1].shape, torch.float32))
            height, width = (side * self.latents.stride for side in latents.shape[-2:])
            return torch.empty(len(latents), 3, height, width, dtype=torch.uint8, device=latents.device)
        pictures = []
        for latent in self.latent_format.process_out(latents.float()).split(1):
            picture = self.vae.decode(latent)
            frames = picture[0] if picture.ndim == 5 else picture
            pictures.append(rearrange(frames, "f h w c -> c h (f w)"))
        return (torch.stack(pictures).clamp(0, 1) * 255).round().to(torch.uint8)

    def _encode(self, picture: Tensor) -> Tensor:
        latent: Tensor = self.vae.encode(picture)
        expected = self.latents.shape(*picture.shape[1:3])
        if latent.shape[1:] != expected:
            raise UserError(
                f"the VAE gives latents of shape {list(latent.shape[1:])}, but the network takes {list(expected)}: "
                "name the VAE of this model in base.vae"
            )
        return latent

    def _encode_shapes(self, pixels: Tensor) -> Tensor:
        shape = self.latents.shape(*pixels.shape[2:])
        _take(self.vae.memory_used_encode((1, 3, *shape[1:-2], *pixels.shape[2:]), torch.float32))
        return torch.empty(len(pixels), *shape, device=pixels.device)

    def to(self, device: torch.device) -> HostAutoencoder:
        """Return the VAE; the host moves it to its device while it is used."""
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        yield from self.vae.first_stage_model.parameters()


def latents_of(latent_format: Any) -> LatentFormat:
    """Return the shape of latents in the host's format; for a video, of one frame."""
    is_video = latent_format.latent_dimensions == 3
    return LatentFormat(
        channels=latent_format.latent_channels,
        stride=latent_format.spacial_downscale_ratio,
        frames=1 if is_video else None,
        frame_stride=latent_format.temporal_downscale_ratio if is_video else 1,
    )


def _take(size: float) -> None:
    """Allocate `size` bytes on the meta device, and free them."""
    torch.empty(int(size), dtype=torch.uint8, device="meta")
