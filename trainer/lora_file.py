"""A LoRA file read into memory: every trainer module that reads one goes through `read_lora`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..tcd import (
    PEFT_CONFIG_KEY,
    LoraModule,
    TargetTime,
    lora_modules,
    parse_peft_config,
    peft_alpha,
    split_target_time,
    to_kohya,
)
from ..tcd.lora_keys import ALPHA, DOWN, UP
from ..tcd.lora_metadata import DEFAULT_TARGET_INPUT, TARGET_TIME_KEY
from .errors import UserError
from .safetensors_file import read_safetensors


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file, whatever names it used for its tensors."""

    tensors: Mapping[str, Tensor]
    """The LoRA's tensors by kohya name; every module has an alpha."""
    target_time: TargetTime | None
    """The target-time embedding, or None if the file has none."""
    metadata: Mapping[str, str]

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """The same tensors grouped into modules, by kohya name."""
        return lora_modules(self.tensors)[0]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Each dtype that the weights (not the alphas) are stored in, in order of appearance."""
        return list(dict.fromkeys(tensor.dtype for name, tensor in self.tensors.items() if not name.endswith(ALPHA)))


def module_scale(module: LoraModule) -> float:
    """The factor alpha / rank that multiplies up @ down."""
    return float(module.tensors[ALPHA]) / module.rank


def module_update(module: LoraModule, strength: float) -> Tensor:
    """Return what a plain LoRA adds to a weight, strength * (alpha / rank) up @ down, float32 [out, in * kernel]."""
    down, up = module.tensors[DOWN].float(), module.tensors[UP].float()
    return strength * module_scale(module) * up.flatten(1) @ down.flatten(1)


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file. A module without alpha gets the alpha of the PEFT config in the metadata, or else its rank.

    Raises UserError if the file is missing, damaged, or not a LoRA.
    """
    tensors, metadata = read_safetensors(path)
    try:
        peft_config = parse_peft_config(metadata.get(PEFT_CONFIG_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{path} has damaged metadata, {PEFT_CONFIG_KEY}: {error}") from error

    def alpha(module: str, rank: int) -> float:
        return peft_alpha(peft_config, module, rank) if peft_config else float(rank)

    lora, embedding = split_target_time(tensors)
    target_input = metadata.get(TARGET_TIME_KEY, DEFAULT_TARGET_INPUT)
    try:
        target_time = TargetTime.from_state_dict(embedding, target_input) if embedding else None
        if not lora:
            raise ValueError("it has no LoRA tensors")
        return LoraFile(to_kohya(lora, alpha), target_time, metadata)
    except ValueError as error:
        raise UserError(f"{path} is not a LoRA that can be used: {error}") from error


def check_plain_lora(name: str, parts: Mapping[str, Tensor]) -> None:
    """Raise UserError if a module has more than the down, up and alpha of a plain LoRA, such as a DoRA magnitude."""
    others = sorted(parts.keys() - {DOWN, UP, ALPHA})
    if others:
        raise UserError(
            f"{name} has {', '.join(others)}, which is more than a plain LoRA: only kohya's names have that"
        )


def refuse_target_time(lora: LoraFile, source: Path, reason: str) -> None:
    """Raise UserError if the LoRA has a target-time embedding, which the format to write cannot hold; reason: why."""
    if lora.target_time is not None:
        raise UserError(f"{source} has an embedding of the target time, and {reason}: load the file itself in ComfyUI")
