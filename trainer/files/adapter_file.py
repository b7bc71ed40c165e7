"""The file of an adapter, read: its LoRA in one spelling, and the embedding of the target time if it has one.

Flows in: a path.  Flows out: tensors by kohya's names, each module with an alpha; or a `UserError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...tcd import TargetTime, peft_alpha, split_target_time, to_kohya
from ..errors import UserError
from ..safetensors_file import read_safetensors

PEFT_SETTINGS = "lora_adapter_metadata"  # where diffusers writes with which alpha PEFT trained
TOLD = "tcd.target_time"
"""In the metadata: what of the target time the network is told, or "none"."""


class AdapterFile(NamedTuple):
    """What a file has for a UNet."""

    lora: dict[str, Tensor]
    """By kohya's names."""
    target_time: TargetTime | None
    metadata: Mapping[str, str]


def read_adapter(path: Path) -> AdapterFile:
    """Read a LoRA, with an alpha for each module: its own, that of PEFT's settings, or else its rank.

    Raises UserError when the file is none.
    """
    tensors, metadata = read_safetensors(path)
    settings = _peft_settings(metadata)

    def alpha(module: str, rank: int) -> float:
        return peft_alpha(settings, module, rank) if settings else float(rank)

    lora, embedding = split_target_time(tensors)
    try:
        target_time = TargetTime.from_state_dict(embedding, metadata.get(TOLD, "s")) if embedding else None
        return AdapterFile(to_kohya(lora, alpha), target_time, metadata)
    except ValueError as error:
        raise UserError(f"{path} is not a LoRA that can be used: {error}") from error


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's settings for the UNet, as diffusers writes them, each key beginning with the part of the pipeline."""
    if PEFT_SETTINGS not in metadata:
        return None
    given = json.loads(metadata[PEFT_SETTINGS])
    return {key.removeprefix("unet."): value for key, value in given.items()}
