"""The prompts of previews and of `tcd-train sample`: encoded once, and sampled as ComfyUI would with the same seeds."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...tcd.distill.sampling import Guidance, initial_noise, sample_latents
from ...tcd.files.atomic import atomic_write
from ..data.buckets import Size
from ..models.conditioning import Conditioning
from ..models.framing import Framing
from ..models.seam import Checkpoint, Model

_MAX_CAPTION = 90  # characters of a prompt in a grid


@dataclass(frozen=True)
class PreviewPrompts:
    """Encoded prompts and seeds. There is a picture for every prompt with every seed, all of the same size."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: tuple[Conditioning, ...]
    """The conditioning of each prompt, one row each."""
    uncond: Conditioning
    """The conditioning of the negative prompt, one row."""
    shape: tuple[int, ...]
    """The shape [1, C, ...] of one latent."""

    @property
    def names(self) -> list[str]:
        """The file name of each picture, without step count and extension, in the order of `sample_previews`."""
        return picture_names(self.prompts, self.seeds)

    @property
    def captions(self) -> list[str]:
        """The caption of each picture in a grid, in ASCII, which is all that the grid's font has."""
        shortened = [_shortened(prompt.encode("ascii", "replace").decode()) for prompt in self.prompts]
        return [f"{prompt} (seed {seed})" for prompt in shortened for seed in self.seeds]


def picture_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the file name of each picture, without step count and extension: every prompt with every seed."""
    return [f"{_file_name(prompt)}-seed-{seed}" for prompt in prompts for seed in seeds]


def encode_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    *,
    device: torch.device,
    negative: str = "",
) -> PreviewPrompts:
    """Encode `prompts`, and the negative one, for pictures of `size` that were neither resized nor cropped.

    Raises UserError if the text encoder is not complete.
    """
    encoded = checkpoint.load_text_encoder(device).encode([*prompts, negative])
    framing = Framing.whole(*size, device=device)
    *cond, uncond = (checkpoint.collate([row], framing) for row in encoded)
    return PreviewPrompts(tuple(prompts), tuple(seeds), tuple(cond), uncond, (1, *checkpoint.latents.shape(*size)))


def sample_previews(model: Model, prompts: PreviewPrompts, *, steps: int, gamma: float, cfg: float) -> list[Tensor]:
    """Sample each picture alone, as ComfyUI would with its seed; returns normalized latents [1, C, ...] each.

    steps: the number of sampling steps. cfg: the guidance scale; 1 is none.
    """
    return [
        sample_latents(
            model,
            cond,
            sigmas=model.schedule.sigmas_for(steps),
            gamma=gamma,
            noise=initial_noise(seed, prompts.shape),
            seed=seed,
            guidance=None if cfg == 1 else Guidance(prompts.uncond, cfg),
        )
        for cond in prompts.cond
        for seed in prompts.seeds
    ]


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, H, W], and create its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        Image.fromarray(rearrange(pixels.cpu().numpy(), "c h w -> h w c")).save(unfinished)


def load_picture(file: Path | io.BytesIO) -> Tensor:
    """Read a picture as uint8 [3, H, W]."""
    with Image.open(file) as image:
        return torch.from_numpy(rearrange(np.array(image.convert("RGB")), "h w c -> c h w"))


def _file_name(prompt: str) -> str:
    """Return a name from the prompt's first words, and a hash that distinguishes prompts with the same first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join([*words, ""])[:40] + hashlib.sha256(prompt.encode()).hexdigest()[:6]


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CAPTION else text[: _MAX_CAPTION - 3] + "..."
