"""A folder of captioned pictures, as what training reads: latents and text embeddings, computed once.

Flows in: a folder, a VAE and a text encoder.  Flows out: a `Dataset` after which neither of the two is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from trainer.errors import UserError
from trainer.randomness import generator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_NAMES_SHOWN = 5


class Picture(NamedTuple):
    """An image file and its caption."""

    path: Path
    caption: str


def find_pictures(folder: Path) -> list[Picture]:
    """List the pictures of a folder (and the folders in it), sorted by path, each decoded once to see that it can be.

    Raises UserError for a folder that is missing or has no picture, and, all together, for pictures without a caption
    and pictures that do not decode.
    """
    if not folder.is_dir():
        raise UserError(f"there is no data folder at {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} has no pictures in it: put {', '.join(sorted(SUFFIXES))} files there")
    bare = [path for path in paths if not path.with_suffix(".txt").is_file()]
    broken = [path for path in paths if not _decodes(path)]
    complaints = []
    if bare:
        complaints.append(f"{len(bare)} of {len(paths)} pictures have no .txt caption beside them: {_names(bare)}")
    if broken:
        complaints.append(f"{len(broken)} of {len(paths)} pictures do not decode: {_names(broken)}")
    if complaints:
        raise UserError(f"{folder}: " + "; ".join(complaints))
    return [Picture(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in paths]


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files of one format or another
        return False
    return True


def _names(paths: Sequence[Path]) -> str:
    more = len(paths) - _NAMES_SHOWN
    return ", ".join(path.name for path in paths[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_square(path: Path, side: int) -> Tensor:
    """A picture as float32 [3, side, side] in [-1, 1]: turned upright, resized to fill the square, center-cropped."""
    with Image.open(path) as image:
        square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    latents: Tensor
    """[B, 4, h, w] float32, drawn from the VAE's posterior."""
    context: Tensor
    """[B, 77, D] text embeddings."""


@dataclass(frozen=True)
class Dataset:
    """Every picture as the mean and standard deviation of its scaled latent, every distinct caption once."""

    mean: Tensor
    """[N, 4, h, w] float32."""
    std: Tensor
    """[N, 4, h, w] float32."""
    contexts: Tensor
    """[K + 1, 77, D]: the embeddings of the distinct captions, after that of the empty one."""
    caption_of: Tensor
    """[N] int64: the row of `contexts` that belongs to each picture."""

    @property
    def uncond(self) -> Tensor:
        """The embedding of the empty caption, [1, 77, D]."""
        return self.contexts[:1]

    def batch(self, step: int, size: int, *, seed: int, caption_dropout: float) -> Batch:
        """The batch of a step: `size` pictures in an order shuffled anew each epoch, a function of (seed, step)."""
        rows = torch.tensor([self._row(step * size + k, seed) for k in range(size)])
        draw = generator(seed, "batch", step)
        noise = torch.randn(self.mean[rows].shape, generator=draw)
        kept = torch.rand(size, generator=draw) >= caption_dropout
        return Batch(self.mean[rows] + self.std[rows] * noise, self.contexts[self.caption_of[rows] * kept])

    def _row(self, position: int, seed: int) -> int:
        """The picture at a position of the endless row of shuffled epochs."""
        epoch, index = divmod(position, len(self.mean))
        return int(_order(len(self.mean), seed, epoch)[index])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """The shuffled order of `count` pictures in one epoch."""
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))


def encode_pictures(
    pictures: Sequence[Picture],
    *,
    vae: AutoencoderKL,
    encode_captions: Callable[[list[str]], Tensor],
    resolution: int,
    batch: int = 8,
) -> Dataset:
    """Run the VAE and the text encoder over all pictures, once, with a progress bar."""
    means, stds = [], []
    for start in tqdm(range(0, len(pictures), batch), desc="encoding pictures", unit="batch"):
        pixels = torch.stack([load_square(picture.path, resolution) for picture in pictures[start : start + batch]])
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device)).latent_dist
        means.append(posterior.mean.cpu() * vae.config.scaling_factor)
        stds.append(posterior.std.cpu() * vae.config.scaling_factor)
    captions = ["", *sorted({picture.caption for picture in pictures} - {""})]
    row = {caption: index for index, caption in enumerate(captions)}
    chunks = [captions[start : start + 64] for start in range(0, len(captions), 64)]
    contexts = torch.cat(
        [encode_captions(chunk).cpu() for chunk in tqdm(chunks, desc="encoding captions", unit="batch")]
    )
    caption_of = torch.tensor([row[picture.caption] for picture in pictures])
    return Dataset(torch.cat(means), torch.cat(stds), contexts, caption_of)
