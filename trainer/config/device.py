"""Where a model runs, and in which numbers.

Flows in: the words of a configuration.  Flows out: torch's device and dtype, or a `UserError`.
"""

from __future__ import annotations

import torch

from ..errors import UserError
from .settings import Config


def device_of(wanted: str) -> torch.device:
    """The device that `training.device` means.

    Raises UserError for one that cannot be used.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"training.device is {wanted!r}, which cannot be used here: {error}") from error
    return device


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights on `device` that `base.dtype` means."""
    if wanted == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def placed(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device of a run and the dtype of its frozen weights.

    Raises UserError as `device_of` does.
    """
    device = device_of(config.training.device)
    return device, dtype_of(config.base.dtype, device)
