"""A full-size SD 1.5 checkpoint with random weights, but real names, shapes and dtypes."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm


def full_size_sd15() -> Path:
    """Return the path of the file, 2.1 GB in fp16; it is written on the first call and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trajectory-consistency"
    path = cache / "sd15-random.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        unet, vae, text = bases.empty_unet("sd15"), bases.empty_vae("sd15"), bases.empty_text_encoder("sd15")
        state = ldm.unet_to_ldm(unet.half().state_dict(), unet.config)
        state |= ldm.vae_to_ldm(vae.half().state_dict(), vae.config) | ldm.text_to_ldm(text.half().state_dict())
        unfinished = path.with_suffix(".unfinished")
        save_file({key: value.contiguous() for key, value in state.items()}, unfinished)
        unfinished.replace(path)
    return path
