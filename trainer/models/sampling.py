"""Which settings a base can be sampled with."""

from __future__ import annotations

from ..errors import UserError
from .seam import Checkpoint


def check_cfg(setting: str, cfg: float, checkpoint: Checkpoint) -> None:
    """Raise UserError if a student would be sampled with cfg although its network takes the guidance scale as an input.

    setting: the name of the setting whose value is cfg.
    """
    if checkpoint.guidance is not None and cfg != 1:
        raise UserError(
            f"{setting} is {cfg:g}, but the network of this base takes the guidance scale as an input, and a LoRA is "
            f"sampled with {checkpoint.guidance:g} there: use {setting} 1"
        )
