"""Models to distill: the interface that the trainer uses (seam.py), and the engines that implement it.

Only this module imports engines, and only when they are needed: importing diffusers takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..config.settings import BaseConfig

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


def _open_unet(base: BaseConfig) -> Checkpoint:
    from .unet.checkpoint import UNetCheckpoint

    return UNetCheckpoint(base)


ENGINES: list[Callable[[BaseConfig], Checkpoint | None]] = [_open_unet]
"""For each engine, a function that opens a model of its kind, or returns None: the first that can is used.

The last one never returns None: it raises a UserError that says what the model is."""


def lora_layouts() -> Iterator[LoraLayout]:
    """Yield how LoRA files are laid out, for each model family of each engine."""
    from .unet.lora_layouts import lora_layouts as unet_layouts

    yield from unet_layouts()
