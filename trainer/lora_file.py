"""A LoRA file read into memory: every trainer module that reads one goes through `read_lora`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..tcd import (
    LoraModule,
    TargetTime,
    alpha_by_metadata,
    lora_modules,
    split_target_time,
    to_kohya,
)
from ..tcd.files.safetensors_file import read_safetensors
from ..tcd.lora_keys import ALPHA, DOWN, UP, is_text_encoder_name
from ..tcd.lora_metadata import DEFAULT_TARGET_INPUT, TARGET_TIME_KEY
from .errors import UserError

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file, whatever names it used for its tensors."""

    tensors: Mapping[str, Tensor]
    """The LoRA's tensors by kohya name; every module with down and up has an alpha."""
    target_time: TargetTime | None
    """The target-time embedding, or None if the file has none."""
    metadata: Mapping[str, str]

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """The same tensors grouped into modules, by kohya name."""
        return lora_modules(self.tensors)[0]

    @cached_property
    def network_modules(self) -> dict[str, LoraModule]:
        """The modules that are not for a text encoder."""
        return {name: module for name, module in self.modules.items() if not is_text_encoder_name(name)}

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
    lora, embedding = split_target_time(tensors)
    target_input = metadata.get(TARGET_TIME_KEY, DEFAULT_TARGET_INPUT)
    try:
        target_time = TargetTime.from_state_dict(embedding, target_input) if embedding else None
        if not lora:
            raise ValueError("it has no LoRA tensors")
        known = alpha_by_metadata(metadata)
        return LoraFile(to_kohya(lora, lambda module, rank: known(module, rank) or rank), target_time, metadata)
    except ValueError as error:
        raise UserError(f"{path} is not a LoRA that can be used: {error}") from error


def check_plain_lora(name: str, parts: Mapping[str, Tensor]) -> None:
    """Raise UserError if a module has more than the down, up and alpha of a plain LoRA, such as a DoRA magnitude."""
    others = sorted(parts.keys() - {DOWN, UP, ALPHA})
    if others:
        raise UserError(
            f"{name} has {', '.join(others)}, which is more than a plain LoRA: ComfyUI applies that, and here only "
            "export --names kohya keeps it"
        )


def by_layer(modules: Mapping[str, LoraModule], layers: Mapping[str, Layer], source: Path) -> dict[Layer, LoraModule]:
    """Return a LoRA's modules by layer; layers: by every kohya name that a file may give them.

    Raises UserError if two modules, in different spellings, are for the same layer.
    """
    names: dict[Layer, str] = {}
    for name in modules:
        if (first := names.setdefault(layers[name], name)) != name:
            raise UserError(f"{source} has {first} and {name}, which are the same layer: remove one of the two")
    return {layer: modules[name] for layer, name in names.items()}


def refuse_target_time(lora: LoraFile, source: Path, reason: str) -> None:
    """Raise UserError if the LoRA has a target-time embedding, which has no place there; reason: why."""
    if lora.target_time is not None:
        raise UserError(
            f"{source} has an embedding of the target time, and {reason}: load the file itself in ComfyUI, or write "
            "the LoRA alone by export --without-target-time, which then predicts something else"
        )
