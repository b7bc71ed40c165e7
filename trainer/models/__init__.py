"""The models to distill: what the trainer asks of one, and the engines that answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.settings import BaseConfig

TINY_NAME = "tiny-sd.safetensors"
"""The file of the model that is embedded here, in trainer/tiny."""

if TYPE_CHECKING:
    from .seam import Checkpoint


def open_checkpoint(base: BaseConfig) -> Checkpoint:
    """Open the model that a configuration names; none of its weights are read yet.

    Raises UserError if nothing is there, the file is damaged, or it cannot be distilled, and says what it is instead.
    """
    from .unet.checkpoint import UNetCheckpoint  # the model library takes seconds to import

    return UNetCheckpoint(base)
