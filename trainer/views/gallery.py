"""Pictures of a finished LoRA: what `tcd-train sample` draws.

Flows in: a LoRA file, its base, and what to draw.  Flows out: a folder of pictures, and a grid of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...tcd.adapter import FILE
from ..atomic import atomic_write
from ..config.device import resolve_dtype
from ..config.settings import BaseConfig, PreviewConfig
from ..data.buckets import Size
from ..errors import UserError
from ..files.adapter_weights import load_weights
from ..files.lora_file import read_lora
from ..models import open_checkpoint
from ..models.seam import Model
from .grid import Row, draw_grid
from .preview_prompts import PreviewPrompts, draw, encode_prompts, picture_names, save_picture

GRID = "grid.jpg"
_CELL_PX = 512  # the longer side of a picture in the grid, where it is larger


def draw_gallery(lora: Path, base: BaseConfig, wanted: PreviewConfig, folder: Path, device: torch.device) -> Path:
    """Draw every prompt from every seed with every number of steps into `folder`; return the path of the grid.

    Sides of 0 are those that the base was trained at.
    Raises UserError when the LoRA is not one for the base, when there is nothing to draw, or when a picture exists.
    """
    paths = _free_paths(folder, wanted)
    checkpoint = open_checkpoint(base)
    checkpoint.check_encoders()
    made_for = read_lora(lora).family
    if made_for != checkpoint.family:
        raise UserError(
            f"{lora} is a LoRA for {made_for or 'no family that is known here'}, and {base.path} is "
            f"{checkpoint.family}: use a base of its family"
        )
    side, dtype = checkpoint.resolution, resolve_dtype(base.dtype, device)
    size = Size(wanted.height or side, wanted.width or side)
    prompts = encode_prompts(checkpoint, wanted.prompts, wanted.seeds, size, device=device, dtype=dtype)
    # In a function of its own, so that the network is out of memory before the autoencoder is loaded.
    latents = _sample(lora, checkpoint.load(dtype, device), prompts, wanted)
    autoencoder = checkpoint.load_autoencoder(device)
    rows = []
    for steps, drawn in zip(wanted.steps, latents, strict=True):
        pictures = [autoencoder.decode(latent)[0].cpu() for latent in drawn]
        for pixels, path in zip(pictures, paths[steps], strict=True):
            save_picture(pixels, path)
        rows.append(Row(f"{steps} step{'s' if steps > 1 else ''}", torch.stack(pictures)))
    title = f"{lora.name.encode('ascii', 'replace').decode()}, eta {wanted.eta:g}, cfg {wanted.cfg:g}"
    with atomic_write(folder / GRID) as unfinished:
        grid = draw_grid(rows, prompts.captions, title, scale=min(2.0, _CELL_PX / max(size)))
        grid.save(unfinished, quality=92)
    return folder / GRID


def _free_paths(folder: Path, wanted: PreviewConfig) -> dict[int, list[Path]]:
    """Where the pictures go, by the number of steps.

    Raises UserError when there are none, and when one would be written over.
    """
    if not wanted.prompts:
        raise UserError("there is nothing to draw: give --prompt")
    names = picture_names(wanted.prompts, wanted.seeds)
    paths = {steps: [folder / f"{name}-steps-{steps}.png" for name in names] for steps in wanted.steps}
    for path in [folder / GRID, *(path for row in paths.values() for path in row)]:
        if path.exists():
            raise UserError(f"{path} exists: choose another folder with --out, or remove it")
    return paths


def _sample(lora: Path, model: Model, prompts: PreviewPrompts, wanted: PreviewConfig) -> list[list[Tensor]]:
    """The latents of each number of steps."""
    model.adapter.add(FILE, load_weights(model, lora))
    bar = tqdm(wanted.steps, desc="drawing", unit="row")
    return [draw(model, prompts, steps=steps, gamma=wanted.eta, cfg=wanted.cfg) for steps in bar]
