"""Writes a new safetensors file, reads it back, and compares it bit for bit with the tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RunError, UserError
from .atomic import atomic_write
from .safetensors_file import read_safetensors


def check_target(path: Path) -> None:
    """Raise UserError if a file exists at `path`, or its folder does not exist."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: make it first")


def write_verified(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors under a temporary name, read them back, and give the file its name only if they are equal.

    Raises UserError if a number is not finite, and RunError if the file read back differs.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(
                f"{path} would have {key} with numbers that are not finite: use a dtype of a wider range, such as "
                "bfloat16, a smaller strength, or files that are not damaged"
            )
    contiguous = {key: value.contiguous() for key, value in tensors.items()}  # safetensors writes no other layout
    with atomic_write(path) as unfinished:
        save_file(contiguous, unfinished, metadata=dict(metadata))
        if not _contains(unfinished, contiguous):
            raise RunError(f"{path} was removed: reading it back gave different content; try another disk")


def _contains(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has exactly these tensors, equal to the last bit."""
    try:
        written, _ = read_safetensors(path)
    except UserError:  # truncated
        return False
    return written.keys() == tensors.keys() and all(
        (value.dtype, value.shape) == (tensors[key].dtype, tensors[key].shape)
        and torch.equal(_as_bytes(value), _as_bytes(tensors[key]))
        for key, value in written.items()
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
