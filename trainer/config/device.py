"""The torch device and dtype that a configuration asks for."""

from __future__ import annotations

import torch

from ..errors import UserError
from .settings import Config


def resolve_device(name: str) -> torch.device:
    """Return the device for a value of `training.device`; "auto" is CUDA or else MPS if available, otherwise the CPU.

    Raises UserError if the device is unknown or cannot be used.
    """
    if name == "auto":
        gpu = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else gpu)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"training.device is {name!r}, which cannot be used here: {error}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the frozen weights' dtype for a value of `base.dtype`.

    "auto" is float32 on a CPU, bfloat16 on a GPU that computes with it, and float16 on another GPU.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if _has_bfloat16(device) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes with bfloat16, and does not only emulate it slowly."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps"  # Apple's M1 has none


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """Return the device of a run and the dtype of its frozen weights.

    Raises UserError if the device is unknown or cannot be used.
    """
    device = resolve_device(config.training.device)
    return device, resolve_dtype(config.base.dtype, device)
