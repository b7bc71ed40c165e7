"""Merges a LoRA into the network and the text encoders of a single-file checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...tcd.files.safetensors_file import attached, read_safetensors
from ...tcd.files.verified_file import check_target, write_verified
from ..errors import UserError
from ..lora_file import LoraFile, by_layer, check_plain_lora, module_update, read_lora, refuse_target_time
from ..models.seam import LoraLayout, StoredWeight
from .layout import check_layouts, names_of


def merge(
    source: Path,
    checkpoint: Path,
    target: Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    without_target_time: bool = False,
) -> None:
    """Write `checkpoint` to `target` with the LoRA in `source` added to its network and its text encoders.

    Each weight changes by strength * (alpha / rank) up @ down. dtype: converts all floating-point weights; None keeps
    the dtype of each. without_target_time: leave the target-time embedding out, instead of refusing it.

    Raises UserError if `target` exists, the LoRA does not fit the checkpoint, the checkpoint is quantised, `strength`
    is not finite, or a weight would not be finite; and RunError if the written file differs from what was meant.
    """
    if not math.isfinite(strength):
        raise UserError(f"the strength is {strength}, and every weight would be no number: use one such as 1")
    check_target(target)
    lora = read_lora(source)
    if not without_target_time:
        refuse_target_time(lora, source, "a checkpoint has none")
    for name, module in lora.modules.items():
        check_plain_lora(name, module.tensors)
    layouts = check_layouts(lora, source)
    tensors, metadata = read_safetensors(checkpoint)
    names = {_stored(layout, name, tensors).name for layout in layouts for name in lora.modules}
    _refuse_quantised(tensors, names, checkpoint, dtype)
    # The checkpoint at hand decides between families that the LoRA fits alike.
    misfits = {layout.family: _misfit(layout, lora, tensors) for layout in layouts}
    layout = next((layout for layout in layouts if misfits[layout.family] is None), None)
    if layout is None:
        reason = misfits[layouts[0].family]
        raise UserError(f"{checkpoint} {reason}: it is not a {names_of(layouts)} checkpoint, for which {source} is")
    by_layer(lora.modules, layout.peft_names, source)  # raises for two modules of one layer
    for name, module in lora.modules.items():
        stored, shape = _stored(layout, name, tensors), layout.shapes[name]
        weight = tensors[stored.name]
        total = weight.to(torch.float32, copy=True)
        stored.read(total, shape).add_(module_update(module, strength).view(shape))
        tensors[stored.name] = total.to(dtype or weight.dtype)  # rounded once
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    write_verified(target, tensors, metadata)


def _stored(layout: LoraLayout, name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Return where a checkpoint has the weight of a layer; if it has it nowhere, the usual place."""
    places = layout.stored[name]
    return next((stored for stored in places if stored.name in tensors), places[0])


def _misfit(layout: LoraLayout, lora: LoraFile, tensors: Mapping[str, Tensor]) -> str | None:
    """Return in what a checkpoint differs from a family in the weights that the LoRA changes, or None."""
    for name in lora.modules:
        stored = _stored(layout, name, tensors)
        if stored.name not in tensors:
            return f"has no {stored.name}"
        try:
            stored.read(tensors[stored.name], layout.shapes[name])
        except ValueError:
            return f"has {stored.name} in the shape {list(tensors[stored.name].shape)}"
    return None


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
