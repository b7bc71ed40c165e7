"""Draws pictures with a finished LoRA, and a grid of them, for `tcd-train sample`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...tcd.adapter import FILE
from ...tcd.files.atomic import atomic_write
from ..config.base import BaseConfig
from ..config.device import resolve_dtype
from ..config.settings import PreviewConfig
from ..data.buckets import Size
from ..errors import UserError
from ..files.adapter_weights import load_weights
from ..models import open_checkpoint
from ..models.sampling import check_cfg
from ..models.seam import Model
from .grid import Row, draw_grid
from .preview_prompts import PreviewPrompts, encode_prompts, picture_names, sample_previews, save_picture

GRID_NAME = "grid.jpg"
_CELL_PX = 512  # longer side of a picture in the grid; smaller pictures are enlarged, at most twofold


def draw_gallery(lora: Path, base: BaseConfig, settings: PreviewConfig, folder: Path, device: torch.device) -> Path:
    """Draw every prompt with every seed and every number of steps into `folder`; return the path of the grid.

    A width or height of 0 in `settings` means the usual resolution of the base.

    Raises UserError if the LoRA does not fit the base, there is no prompt, a size is no multiple of the base's latent
    stride, the base takes no cfg, or a picture exists already.
    """
    paths = _picture_paths(folder, settings)
    checkpoint = open_checkpoint(base)
    checkpoint.check_encoders()
    check_cfg("cfg", settings.cfg, checkpoint)
    load_weights(checkpoint.load(torch.float32, torch.device("meta")), lora)  # raises if it does not fit the base
    checkpoint.latents.check_size("width", settings.width)
    checkpoint.latents.check_size("height", settings.height)
    side, dtype = checkpoint.resolution, resolve_dtype(base.dtype, device)
    size = Size(settings.height or side, settings.width or side)
    prompts = encode_prompts(checkpoint, settings.prompts, settings.seeds, size, device=device)
    # A separate function, so that the network is freed before the autoencoder is loaded.
    latents = _sample(lora, checkpoint.load(dtype, device), prompts, settings)
    autoencoder = checkpoint.load_autoencoder(device)
    rows = []
    for steps, row_latents in zip(settings.steps, latents, strict=True):
        pictures = [autoencoder.decode(latent)[0].cpu() for latent in row_latents]
        for pixels, path in zip(pictures, paths[steps], strict=True):
            save_picture(pixels, path)
        rows.append(Row(f"{steps} step{'s' if steps > 1 else ''}", torch.stack(pictures)))
    title = f"{lora.name.encode('ascii', 'replace').decode()}, eta {settings.eta:g}, cfg {settings.cfg:g}"
    with atomic_write(folder / GRID_NAME) as unfinished:
        grid = draw_grid(rows, prompts.captions, title, scale=min(2.0, _CELL_PX / max(size)))
        grid.save(unfinished, quality=92)
    return folder / GRID_NAME


def _picture_paths(folder: Path, settings: PreviewConfig) -> dict[int, list[Path]]:
    """Return the path of each picture, by number of steps.

    Raises UserError if there is no prompt, or if a picture or the grid exists already.
    """
    if not settings.prompts:
        raise UserError("there is nothing to draw: give --prompt")
    names = picture_names(settings.prompts, settings.seeds)
    paths = {steps: [folder / f"{name}-steps-{steps}.png" for name in names] for steps in settings.steps}
    for path in [folder / GRID_NAME, *(path for row in paths.values() for path in row)]:
        if path.exists():
            raise UserError(f"{path} exists: choose another folder with --out, or remove it")
    return paths


def _sample(lora: Path, model: Model, prompts: PreviewPrompts, settings: PreviewConfig) -> list[list[Tensor]]:
    """Return the normalized latents [1, C, ...] of each picture, for each number of steps."""
    model.adapter.add(FILE, load_weights(model, lora))
    bar = tqdm(settings.steps, desc="drawing", unit="row")
    return [sample_previews(model, prompts, steps=steps, gamma=settings.eta, cfg=settings.cfg) for steps in bar]
