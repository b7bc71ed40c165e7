"""Recognizes the model family that a LoRA file belongs to, by its module names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from ...tcd import coverage, kohya_name
from ..errors import UserError
from ..models.unet import families
from .lora_file import LoraFile


def family_of(lora: LoraFile) -> families.Family | None:
    """Return the first family whose UNet has every module of the LoRA with the same shape, or None."""
    for family in get_args(families.Family):
        shapes = {kohya_name(path): shape for path, shape in families.layer_shapes(family).items()}
        if coverage(lora.tensors, shapes).complete:
            return family
    return None


def check_family(lora: LoraFile, source: Path) -> families.Family:
    """Return the family of the LoRA that was read from `source`; raises UserError if it fits no known family."""
    family = family_of(lora)
    if family is None:
        known = ", ".join(get_args(families.Family))
        raise UserError(f"{source} is a LoRA for no family that is known here ({known})")
    return family


def layer_paths(lora: LoraFile, family: families.Family) -> dict[str, str]:
    """Return the diffusers path, such as "mid_block.resnets.0.conv1", of each module of the LoRA by kohya name."""
    paths = {kohya_name(path): path for path in families.layer_shapes(family)}
    return {name: paths[name] for name in lora.modules}
