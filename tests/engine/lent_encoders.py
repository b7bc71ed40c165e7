"""Small text encoders and VAEs for families whose own are too large for tests.

The host's CLIP object and tokenizer stay the real ones: only the network within is small. Captions differ in length.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import comfy.sd
import comfy.sd1_clip
import torch
from comfy.supported_models_base import ClipTarget
from families import Family
from lent_models.small_text import SmallText
from torch import Tensor, nn
from torch.nn import functional

from trajectory_consistency.trainer.models.comfy.autoencoder import HostAutoencoder
from trajectory_consistency.trainer.models.comfy.checkpoint import HostCheckpoint
from trajectory_consistency.trainer.models.comfy.text_encoder import HostTextEncoder


class SmallVae:
    """Averages squares of pixels, and fills the channels with multiples of the result; decodes the first three."""

    first_stage_model = nn.Identity()

    def __init__(self, shape: tuple[int, ...], stride: int) -> None:
        self.channels, self.has_frames, self.stride = shape[0], len(shape) == 4, stride

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pictures [1, H, W, 3] as the host's VAEs do."""
        cells = functional.avg_pool2d(pixels.movedim(-1, 1), self.stride) - 0.5
        latents = torch.cat([cells * (1 + k) for k in range(-(-self.channels // 3))], dim=1)[:, : self.channels]
        return latents.unsqueeze(2) if self.has_frames else latents

    def memory_used_encode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """As of the host's VAEs: the bytes that encoding takes."""
        return 100 * shape[-2] * shape[-1]

    def memory_used_decode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """As of the host's VAEs: the bytes that decoding takes."""
        return 100 * shape[-2] * shape[-1]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures [1, H, W, 3], or videos [1, 1, H, W, 3]."""
        pictures = functional.interpolate(latents.squeeze(2) if self.has_frames else latents, scale_factor=self.stride)
        colors = (pictures[:, :3] + 0.5).movedim(1, -1)
        return colors.unsqueeze(1) if self.has_frames else colors


def lend(family: Family) -> mock._patch_dict | Any:
    """Within the block, HostCheckpoint loads small encoders that fit a family's stand-in."""

    class Text(SmallText):
        width, pooled, has_mask = family.context[1], family.pooled or 0, family.has_mask

    target = ClipTarget(comfy.sd1_clip.SD1Tokenizer, Text)

    def load_text_encoder(self: HostCheckpoint, device: torch.device) -> HostTextEncoder:
        cpu = torch.device("cpu")
        options = {"dtype": torch.float32, "load_device": cpu, "offload_device": cpu, "initial_device": device}
        return HostTextEncoder(comfy.sd.CLIP(target, model_options=options))

    def load_autoencoder(self: HostCheckpoint, device: torch.device) -> HostAutoencoder:
        return HostAutoencoder(SmallVae(family.latent, self.latents.stride), self._config.latent_format)

    return mock.patch.multiple(
        HostCheckpoint,
        load_text_encoder=load_text_encoder,
        load_autoencoder=load_autoencoder,
        check_encoders=lambda self: None,
    )
