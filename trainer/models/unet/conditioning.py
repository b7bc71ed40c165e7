"""Captions of different lengths in one batch for a UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..conditioning import Conditioning

CONTEXT, MASK = "context", "mask"


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate rows; if they differ in length, pad them with zeros and add `mask`, bool [B, L], True for tokens.

    Raises ValueError if they do not all have the same names.
    """
    lengths = [part.tensors[CONTEXT].shape[1] for part in parts]
    if len(set(lengths)) == 1 and not any(MASK in part.tensors for part in parts):
        return Conditioning.cat(parts)
    return Conditioning.cat([_padded(part, max(lengths)) for part in parts])


def _padded(part: Conditioning, length: int) -> Conditioning:
    context: Tensor = part.tensors[CONTEXT]
    mask = part.tensors.get(MASK, torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))
    missing = length - context.shape[1]
    padded = {CONTEXT: functional.pad(context, (0, 0, 0, missing)), MASK: functional.pad(mask, (0, missing))}
    return Conditioning({**part.tensors, **padded})
