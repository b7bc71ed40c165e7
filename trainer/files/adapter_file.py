"""The file of an adapter, read: its LoRA in one spelling, and the embedding of the target time if it has one.

Flows in: a path.  Flows out: tensors by kohya's names, each module with an alpha; or a `UserError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...tcd import PEFT_CONFIG_KEY, TargetTime, parse_peft_config, peft_alpha, split_target_time, to_kohya
from ...tcd.lora_metadata import DEFAULT_TARGET_INPUT, TARGET_TIME_KEY
from ..errors import UserError
from ..safetensors_file import read_safetensors


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
    try:
        peft_config = parse_peft_config(metadata.get(PEFT_CONFIG_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{path} has damaged metadata, {PEFT_CONFIG_KEY}: {error}") from error

    def alpha(module: str, rank: int) -> float:
        return peft_alpha(peft_config, module, rank) if peft_config else float(rank)

    lora, embedding = split_target_time(tensors)
    try:
        target_time = (
            TargetTime.from_state_dict(embedding, metadata.get(TARGET_TIME_KEY, DEFAULT_TARGET_INPUT))
            if embedding
            else None
        )
        return AdapterFile(to_kohya(lora, alpha), target_time, metadata)
    except ValueError as error:
        raise UserError(f"{path} is not a LoRA that can be used: {error}") from error
