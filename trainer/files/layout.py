"""Recognizes the model families that a LoRA file can belong to, by its module names and shapes."""

from __future__ import annotations

from pathlib import Path

from ...tcd import coverage
from ...tcd.lora_metadata import FAMILY_KEY
from ..errors import UserError
from ..lora_file import LoraFile
from ..models import lora_layouts
from ..models.seam import LoraLayout


def layouts_of(lora: LoraFile) -> list[LoraLayout]:
    """Return the layouts of the families that have every module of the LoRA with the same shape.

    There may be several: a LoRA without cross-attention, for example, fits SD1.5 and SD2.x. Its modules then have the
    same names in PEFT's format for each of them.
    """
    return [layout for layout in lora_layouts() if coverage(lora.tensors, layout.shapes).complete]


def names_of(layouts: list[LoraLayout]) -> str:
    """Return the names of the families, such as "sd15 or sd2"."""
    return " or ".join(layout.family for layout in layouts)


def check_layouts(lora: LoraFile, source: Path) -> list[LoraLayout]:
    """Return the layouts of the LoRA that was read from `source`; raises UserError if it fits no known family."""
    layouts = layouts_of(lora)
    if not layouts:
        known = ", ".join(layout.family for layout in lora_layouts()) or "UNets, and need diffusers"
        family = lora.metadata.get(FAMILY_KEY)
        whose = f"{family}, a family that ComfyUI loads" if family else "no family that is known here"
        raise UserError(
            f"{source} is a LoRA for {whose}: PEFT's names and merged checkpoints are for {known} alone. ComfyUI "
            "loads the file as it is, and export --names kohya --dtype ... writes it in another dtype"
        )
    return layouts
