"""Pictures of a finished LoRA: what `tcd-train sample` draws.

Flows in: a LoRA file, its base, and what to draw.  Flows out: a folder of pictures, and a grid of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import whole_file
from ..config.device import dtype_of
from ..config.settings import BaseConfig, PreviewConfig
from ..data.buckets import Size
from ..errors import UserError
from ..files.lora_file import read_lora
from ..models.sampling import decode
from ..models.unet import families as bases
from ..models.unet.adapter import load_adapter
from ..models.unet.network import Network
from ..models.unet.teacher import identify, load_base, load_vae
from .grid import Row, draw_grid
from .preview_prompts import Scenes, draw, encode_scenes, save_picture, scene_names

GRID = "grid.jpg"
_CELL_PX = 512  # the longer side of a picture in the grid, where it is larger


def draw_gallery(lora: Path, base: BaseConfig, wanted: PreviewConfig, folder: Path, device: torch.device) -> Path:
    """Draw every prompt from every seed with every number of steps into `folder`; return the path of the grid.

    Sides of 0 are those that the family was trained at.
    Raises UserError when the LoRA is not one for the base, when there is nothing to draw, or when a picture exists.
    """
    paths = _free_paths(folder, wanted)
    family = identify(base.path, prediction=base.prediction, zero_snr=base.zero_snr, vae=base.vae).family
    made_for = read_lora(lora).family
    if made_for != family:
        raise UserError(
            f"{lora} is a LoRA for {made_for or 'no family that is known here'}, and {base.path} is {family}: "
            "use a base of its family"
        )
    side, dtype = bases.resolution(family), dtype_of(base.dtype, device)
    size = Size(wanted.height or side, wanted.width or side)
    scenes = encode_scenes(wanted.prompts, wanted.seeds, size, base=base.path, device=device, dtype=dtype)
    latents = _sample(lora, base, scenes, wanted, device, dtype)  # and the UNet is out of memory before the VAE is in
    vae = load_vae(base.path, vae=base.vae).to(device)
    rows = []
    for steps, drawn in zip(wanted.steps, latents, strict=True):
        pictures = [decode(vae, latent)[0] for latent in drawn]
        for pixels, path in zip(pictures, paths[steps], strict=True):
            save_picture(pixels, path)
        rows.append(Row(f"{steps} step{'s' if steps > 1 else ''}", torch.stack(pictures)))
    title = f"{lora.name.encode('ascii', 'replace').decode()}, eta {wanted.eta:g}, cfg {wanted.cfg:g}"
    with whole_file(folder / GRID) as unfinished:
        grid = draw_grid(rows, scenes.captions, title, scale=min(2.0, _CELL_PX / max(size)))
        grid.save(unfinished, quality=92)
    return folder / GRID


def _free_paths(folder: Path, wanted: PreviewConfig) -> dict[int, list[Path]]:
    """Where the pictures go, by the number of steps.

    Raises UserError when there are none, and when one would be written over.
    """
    if not wanted.prompts:
        raise UserError("there is nothing to draw: give --prompt")
    names = scene_names(wanted.prompts, wanted.seeds)
    paths = {steps: [folder / f"{name}-steps-{steps}.png" for name in names] for steps in wanted.steps}
    for path in [folder / GRID, *(path for row in paths.values() for path in row)]:
        if path.exists():
            raise UserError(f"{path} exists: choose another folder with --out, or remove it")
    return paths


def _sample(
    lora: Path, base: BaseConfig, scenes: Scenes, wanted: PreviewConfig, device: torch.device, dtype: torch.dtype
) -> list[list[Tensor]]:
    """The latents of each number of steps."""
    loaded = load_base(base.path, prediction=base.prediction, zero_snr=base.zero_snr, dtype=dtype)
    network = Network(loaded.unet.to(device), loaded.alpha_bar.float().to(device), loaded.prediction)
    load_adapter(network.unet, lora)
    bar = tqdm(wanted.steps, desc="drawing", unit="row")
    return [draw(network, scenes, steps=steps, gamma=wanted.eta, cfg=wanted.cfg) for steps in bar]
