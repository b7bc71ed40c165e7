"""Models to distill: the interface that the trainer uses (seam.py), and the engines that implement it.

Only this module imports engines, and only when they are needed: importing diffusers takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..config.base import BaseConfig
from ..errors import UserError
from ..user_path import user_path

TINY_NAME = "tiny-sd.safetensors"
"""File name of the embedded model, in trainer/tiny."""

if TYPE_CHECKING:
    from .seam import Checkpoint, LoraLayout


def open_checkpoint(base: BaseConfig) -> Checkpoint:
    """Open the model that a configuration names, without loading its weights.

    Raises UserError if there is no model, the file is damaged, or it is not supported; the message says what it is.
    """
    opened = (engine(base) for engine in ENGINES)
    return next(checkpoint for checkpoint in opened if checkpoint is not None)


def _open_unet(base: BaseConfig) -> Checkpoint | None:
    """Open a UNet by diffusers; with base.engine = auto, None if there is no diffusers, or it is another model."""
    if base.engine == "comfyui" or base.model:
        return None
    if base.engine == "auto" and find_spec("diffusers") is None:
        return None
    from .unet.checkpoint import UNetCheckpoint
    from .unet.families import UnknownModelError

    try:
        return UNetCheckpoint(base)
    except UnknownModelError as error:
        if base.engine == "diffusers" or user_path(base.path).is_dir():  # ComfyUI opens files alone
            raise
        return _open_comfyui(base, error)


def _open_comfyui(base: BaseConfig, unknown: UserError | None = None) -> Checkpoint:
    """Open any model by ComfyUI. unknown: why diffusers cannot, which is the error if there is no ComfyUI either."""
    from .comfy.checkpoint import HostCheckpoint
    from .comfy.library import load_comfyui

    try:
        load_comfyui()
    except UserError as error:
        raise (UserError(f"{unknown}. ComfyUI could not be asked: {error}") if unknown else error) from None
    return HostCheckpoint(base)


ENGINES: list[Callable[[BaseConfig], Checkpoint | None]] = [_open_unet, _open_comfyui]
"""For each engine, a function that opens a model of its kind, or returns None: the first that can is used.

The last one never returns None: it raises a UserError that says what the model is."""


def lora_layouts() -> Iterator[LoraLayout]:
    """Yield how LoRA files are laid out, for each family of UNets; none if there is no diffusers, which builds them.

    Files for other models have the names of their own networks, which only ComfyUI knows.
    """
    if find_spec("diffusers") is None:
        return
    from .unet.lora_layouts import lora_layouts as unet_layouts

    yield from unet_layouts()
