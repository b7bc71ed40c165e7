"""What previews draw: every prompt from every seed, encoded once, and sampled as ComfyUI would."""

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

from ..atomic import atomic_write
from ..data.buckets import Fit, Size
from ..models.conditioning import Conditioning
from ..models.sampling import Guidance, initial_noise, sample_latents
from ..models.seam import Checkpoint, Model

_SHOWN = 90  # letters of a prompt in a grid


@dataclass(frozen=True)
class PreviewPrompts:
    """Pictures to draw: every prompt from every seed, one size for all."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: tuple[Conditioning, ...]
    """One row to each prompt."""
    uncond: Conditioning
    """The empty caption, one row."""
    shape: tuple[int, ...]
    """The shape of one latent, [1, C, ...]."""

    @property
    def names(self) -> list[str]:
        """A name for the file of each picture, in the order of `draw`."""
        return picture_names(self.prompts, self.seeds)

    @property
    def captions(self) -> list[str]:
        """The caption above each picture in a grid, in letters that the grid's font has."""
        shown = [_short(prompt.encode("ascii", "replace").decode()) for prompt in self.prompts]
        return [f"{prompt} (seed {seed})" for prompt in shown for seed in self.seeds]


def picture_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A name for the file of each picture, every prompt from every seed."""
    return [f"{_file_name(prompt)}-seed-{seed}" for prompt in prompts for seed in seeds]


def encode_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PreviewPrompts:
    """Encode `prompts` for pictures of `size` that were neither resized nor cropped.

    Raises UserError if the text encoder is not complete.
    """
    encoded = checkpoint.load_text_encoder(dtype, device).encode([*prompts, ""])
    sizes = torch.tensor([Fit(size, size, size, 0, 0).sizes], device=device)
    *cond, uncond = (checkpoint.collate([row], sizes) for row in encoded)
    return PreviewPrompts(tuple(prompts), tuple(seeds), tuple(cond), uncond, (1, *checkpoint.latents.shape(*size)))


def draw(model: Model, wanted: PreviewPrompts, *, steps: int, gamma: float, cfg: float) -> list[Tensor]:
    """Sample each picture by itself, as ComfyUI would with its seed: normalized latents [1, C, ...]."""
    return [
        sample_latents(
            model,
            cond,
            sigmas=model.schedule.sigmas_for(steps),
            gamma=gamma,
            noise=initial_noise(seed, wanted.shape),
            seed=seed,
            guidance=None if cfg == 1 else Guidance(wanted.uncond, cfg),
        )
        for cond in wanted.cond
        for seed in wanted.seeds
    ]


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, H, W], and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        Image.fromarray(rearrange(pixels.cpu().numpy(), "c h w -> h w c")).save(unfinished)


def load_picture(file: Path | io.BytesIO) -> Tensor:
    """A picture that was saved, uint8 [3, H, W]."""
    with Image.open(file) as image:
        return torch.from_numpy(rearrange(np.array(image.convert("RGB")), "h w c -> c h w"))


def _file_name(prompt: str) -> str:
    """The prompt as far as it can be in a file's name, and what tells it from those that begin alike."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join([*words, ""])[:40] + hashlib.sha256(prompt.encode()).hexdigest()[:6]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
