"""Models to distill: the interface that the trainer uses (seam.py), and the engines that implement it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.settings import BaseConfig

TINY_NAME = "tiny-sd.safetensors"
"""File name of the embedded model, in trainer/tiny."""

if TYPE_CHECKING:
    from .seam import Checkpoint


def open_checkpoint(base: BaseConfig) -> Checkpoint:
    """Open the model that a configuration names, without loading its weights.

    Raises UserError if there is no model, the file is damaged, or it is not supported; the message says what it is.
    """
    from .unet.checkpoint import UNetCheckpoint  # imported here because diffusers takes seconds to import

    return UNetCheckpoint(base)
