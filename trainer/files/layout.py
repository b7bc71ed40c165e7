"""Recognizes the model family that a LoRA file belongs to, by its module names and shapes."""

from __future__ import annotations

from pathlib import Path

from ...tcd import coverage
from ...tcd.lora_metadata import FAMILY_KEY
from ..errors import UserError
from ..lora_file import LoraFile
from ..models import lora_layouts
from ..models.seam import LoraLayout


def layout_of(lora: LoraFile) -> LoraLayout | None:
    """Return the layout of the first family that has every module of the LoRA with the same shape, or None."""
    return next((layout for layout in lora_layouts() if coverage(lora.tensors, layout.shapes).complete), None)


def check_layout(lora: LoraFile, source: Path) -> LoraLayout:
    """Return the layout of the LoRA that was read from `source`; raises UserError if it fits no known family."""
    layout = layout_of(lora)
    if layout is None:
        known = ", ".join(layout.family for layout in lora_layouts()) or "UNets, and need diffusers"
        family = lora.metadata.get(FAMILY_KEY)
        whose = f"{family}, a family that ComfyUI loads" if family else "no family that is known here"
        raise UserError(
            f"{source} is a LoRA for {whose}: PEFT's names and merged checkpoints are for {known} alone. ComfyUI "
            "loads the file as it is, and export --names kohya --dtype ... writes it in another dtype"
        )
    return layout
