"""Writes a LoRA file again with different tensor names or in a different dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...tcd import PEFT_CONFIG_KEY
from ...tcd.files.verified_file import check_target, write_verified
from ...tcd.lora_keys import ALPHA, DOWN, UP
from ...tcd.lora_metadata import TARGET_TIME_KEY, TARGET_TIME_MODULE_KEY
from ...tcd.target_time import PREFIX
from ..lora_file import LoraFile, by_layer, check_plain_lora, module_scale, read_lora, refuse_target_time
from .layout import check_layouts

Naming = Literal["kohya", "peft"]


def convert(
    source: Path, target: Path, *, naming: Naming, dtype: torch.dtype, without_target_time: bool = False
) -> None:
    """Write the LoRA in `source` to `target` with the names of `naming`, its weights in `dtype`, its metadata kept.

    without_target_time: leave the target-time embedding out, for loaders that refuse the file because of it.

    Raises UserError if `target` exists, or if the names cannot express what `source` contains (PEFT's have no
    target-time embedding and no DoRA), and RunError if the written file differs from what was meant.
    """
    check_target(target)
    lora = read_lora(source)
    if without_target_time:
        lora = _without_target_time(lora)
    tensors = _kohya_tensors(lora) if naming == "kohya" else _peft_tensors(lora, source)
    cast = {name: tensor if name.endswith(ALPHA) else tensor.to(dtype) for name, tensor in tensors.items()}
    # The PEFT config is left out: its alphas are in the tensors now, and a reader would apply them a second time.
    metadata = {key: value for key, value in lora.metadata.items() if key != PEFT_CONFIG_KEY}
    write_verified(target, cast, metadata)


def _without_target_time(lora: LoraFile) -> LoraFile:
    metadata = {key: value for key, value in lora.metadata.items() if key != TARGET_TIME_MODULE_KEY}
    if TARGET_TIME_KEY in metadata:
        metadata[TARGET_TIME_KEY] = "none"
    return replace(lora, target_time=None, metadata=metadata)


def _kohya_tensors(lora: LoraFile) -> dict[str, Tensor]:
    embedding = {} if lora.target_time is None else lora.target_time.state_dict()
    return {**lora.tensors, **{f"{PREFIX}{name}": tensor for name, tensor in embedding.items()}}


def _peft_tensors(lora: LoraFile, source: Path) -> dict[str, Tensor]:
    """PEFT's names have no alpha, so alpha / rank is multiplied into the up half."""
    refuse_target_time(lora, source, "PEFT's names have none")
    for name, module in lora.modules.items():
        check_plain_lora(name, module.tensors)
    names = check_layouts(lora, source)[0].peft_names
    tensors: dict[str, Tensor] = {}
    for name, module in by_layer(lora.modules, names, source).items():
        tensors[f"{name}.lora_A.weight"] = module.tensors[DOWN]
        tensors[f"{name}.lora_B.weight"] = module.tensors[UP].float() * module_scale(module)
    return tensors
