"""Merges a LoRA into the network of a single-file checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..lora_file import check_plain_lora, module_update, read_lora, refuse_target_time
from ..safetensors_file import attached, read_safetensors
from .layout import check_layout
from .verified_file import check_target, write_verified


def merge(
    source: Path, checkpoint: Path, target: Path, *, strength: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Write `checkpoint` to `target` with the LoRA in `source` added to its network.

    Each weight changes by strength * (alpha / rank) up @ down. dtype: converts all floating-point weights; None keeps
    the dtype of each.

    Raises UserError if `target` exists, the LoRA does not fit the checkpoint, the checkpoint is quantised, `strength`
    is not finite, or a weight would not be finite; and RunError if the written file differs from what was meant.
    """
    if not math.isfinite(strength):
        raise UserError(f"the strength is {strength}, and every weight would be no number: use one such as 1")
    check_target(target)
    lora = read_lora(source)
    refuse_target_time(lora, source, "a checkpoint has none")
    layout = check_layout(lora, source)
    tensors, metadata = read_safetensors(checkpoint)
    _refuse_quantised(tensors, {layout.checkpoint_keys[name] for name in lora.modules}, checkpoint, dtype)
    for name, module in lora.modules.items():
        check_plain_lora(name, module.tensors)
        key = layout.checkpoint_keys[name]
        if key not in tensors:
            raise UserError(f"{checkpoint} has no {key}: it is not a {layout.family} checkpoint, for which {source} is")
        weight = tensors[key]
        update = module_update(module, strength)
        if update.numel() != weight.numel():
            raise UserError(f"{checkpoint} has {key} in the shape {list(weight.shape)}, which does not fit {source}")
        tensors[key] = (weight.float() + update.view(weight.shape)).to(dtype or weight.dtype)  # rounded once
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    write_verified(target, tensors, metadata)


def _refuse_quantised(
    tensors: Mapping[str, Tensor], keys: set[str], checkpoint: Path, dtype: torch.dtype | None
) -> None:
    """Raise UserError if rounding would lose the LoRA, or a weight that changes has a scale or another packing.

    keys: the weights that the LoRA changes. With a dtype, all weights of 8 bits change.
    """
    small = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize == 1}
    changed = {key for key in keys if key in tensors} | (small if dtype else set())
    biases = {key.removesuffix("weight") + "bias" for key in changed}
    packed = [*attached(tensors, changed | biases), *(key for key in changed if not tensors[key].is_floating_point())]
    if packed:
        raise UserError(
            f"{checkpoint} has quantised weights ({packed[0]}), which a LoRA cannot be merged into: use the checkpoint "
            "that it was made from, or load the LoRA beside it, with TCDLoraLoader"
        )
    if keys & small and (dtype is None or dtype.itemsize == 1):
        raise UserError(
            f"{checkpoint} has weights of 8 bits ({min(keys & small)}), whose rounding is off by a third or more of "
            "what a LoRA changes: use --dtype float16, or load the LoRA beside them, with TCDLoraLoader"
        )
