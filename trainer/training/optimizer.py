"""The choice of the optimizer."""

from __future__ import annotations

import torch

from ..config.settings import TrainingConfig
from ..errors import UserError


def optimizer_class(training: TrainingConfig) -> type[torch.optim.Optimizer]:
    """Return AdamW, or bitsandbytes' AdamW with 8-bit moments.

    Raises UserError if the latter is configured and bitsandbytes is not installed.
    """
    if training.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"training.optimizer is {training.optimizer!r}, which needs bitsandbytes ({error}): "
            "pip install bitsandbytes, or use adamw"
        ) from error
    adamw_8bit: type[torch.optim.Optimizer] = AdamW8bit
    return adamw_8bit
