"""How LoRA files for the UNets of the supported families are laid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from ....tcd import kohya_name
from ..seam import LoraLayout
from . import families, ldm
from .families import Family


def lora_layouts() -> Iterator[LoraLayout]:
    """Yield the layout of each family, each built when it is asked for."""
    yield from map(_layout, get_args(Family))


def _layout(family: Family) -> LoraLayout:
    by_path = families.layer_shapes(family)
    locations = ldm.unet_locations([f"{path}.weight" for path in by_path], families.config(family, "unet"))
    return LoraLayout(
        family,
        shapes={kohya_name(path): shape for path, shape in by_path.items()},
        peft_names={kohya_name(path): f"unet.{path}" for path in by_path},
        checkpoint_keys={kohya_name(path): locations[f"{path}.weight"].name for path in by_path},
    )
