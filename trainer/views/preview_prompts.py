"""Pictures to draw: prompts from seeds, encoded once, and drawn as ComfyUI would.

Flows in: prompts, seeds and a size.  Flows out: latents in one fixed order, and a name for the file of each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...tcd import timestep_grid
from ..atomic import whole_file
from ..data.buckets import Fit, Size
from ..data.dataset import told
from ..models.conditioning import Conditioning
from ..models.sampling import Guidance, initial_noise, sample_latents
from ..models.unet.network import Network
from ..models.unet.teacher import load_text_encoder

_SHOWN = 90  # letters of a prompt in a grid


@dataclass(frozen=True)
class Scenes:
    """Pictures to draw: every prompt from every seed, one size for all."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    cond: Conditioning
    """A row to a prompt."""
    uncond: Conditioning
    """The empty caption, one row."""
    shape: tuple[int, int, int, int]
    """Of one latent, [1, 4, h, w]."""

    @property
    def names(self) -> list[str]:
        """A name for the file of each picture, in the order of `draw`."""
        return scene_names(self.prompts, self.seeds)

    @property
    def captions(self) -> list[str]:
        """What stands above each picture in a grid, in the letters that its font has."""
        shown = [_short(prompt.encode("ascii", "replace").decode()) for prompt in self.prompts]
        return [f"{prompt} (seed {seed})" for prompt in shown for seed in self.seeds]


def scene_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A name for the file of each picture, every prompt from every seed."""
    return [f"{_file_name(prompt)}-seed-{seed}" for prompt in prompts for seed in seeds]


def encode_scenes(
    prompts: Sequence[str], seeds: Sequence[int], size: Size, *, base: str, device: torch.device, dtype: torch.dtype
) -> Scenes:
    """Encode `prompts` by the model at the path `base`, as if their pictures were whole and not cropped.

    Raises UserError as `load_base` does.
    """
    encoded = load_text_encoder(base, dtype=dtype).to(device).encode([*prompts, ""])
    time_ids = torch.tensor(Fit(size, size, size, 0, 0).time_ids, device=device).float().expand(len(encoded), -1)
    all_told = told(encoded, time_ids)
    return Scenes(tuple(prompts), tuple(seeds), all_told[:-1], all_told[-1:], (1, 4, size.height // 8, size.width // 8))


def draw(network: Network, scenes: Scenes, *, steps: int, gamma: float, cfg: float) -> list[Tensor]:
    """Sample each picture by itself, as ComfyUI would with its seed: scaled latents [1, 4, h, w]."""
    return [
        sample_latents(
            network,
            scenes.cond[k : k + 1],
            timesteps=timestep_grid(steps),
            gamma=gamma,
            noise=initial_noise(seed, scenes.shape),
            seed=seed,
            guidance=None if cfg == 1 else Guidance(scenes.uncond, cfg),
        )
        for k in range(len(scenes.prompts))
        for seed in scenes.seeds
    ]


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, H, W], and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished)


def load_picture(path: Path) -> Tensor:
    """A picture that was saved, uint8 [3, H, W]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _file_name(prompt: str) -> str:
    """The prompt as far as it can be in a file's name, and what tells it from those that begin alike."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join([*words, ""])[:40] + hashlib.sha256(prompt.encode()).hexdigest()[:6]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
