"""How LoRA files for the UNets of the supported families, and for their text encoders, are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

import torch

from ....tcd import kohya_name
from ....tcd.adapter import layer_shapes
from ..seam import LoraLayout
from . import families, ldm
from .families import Family
from .text import CLIPS, ClipEncoder

UNET = "unet"
_TEXT_PREFIXES = {
    1: (("lora_te_", "lora_te1_"),),
    2: (("lora_te_", "lora_te1_"), ("lora_te2_",)),
}
"""For each number of text encoders: the prefixes of each one's layers in kohya's spelling."""


class LoraLayer(NamedTuple):
    """A layer that can have a LoRA."""

    part: str
    """UNET, or the part of a text encoder."""
    path: str
    """In the part's model."""
    shape: tuple[int, ...]
    """Of its weight, [out, in, ...]."""
    peft_name: str
    stored: tuple[ldm.TensorLocation, ...]
    """Where its weight may be in a single-file checkpoint."""


def lora_layouts() -> Iterator[LoraLayout]:
    """Yield the layout of each family, each built when it is asked for."""
    yield from map(_layout, get_args(Family))


def lora_layers(family: Family) -> Mapping[str, LoraLayer]:
    """Return the layers of a family by every name that files give them, as kohya_name spells it."""
    return dict(_named_layers(family))


def unet_names(path: str, location: ldm.TensorLocation) -> tuple[str, str]:
    """Return the kohya names of a UNet's layer: by its path in diffusers, and by its key in a single file (kohya's)."""
    return kohya_name(path), kohya_name(location.name.removesuffix(".weight"))


def _layout(family: Family) -> LoraLayout:
    layers = lora_layers(family)
    return LoraLayout(
        family,
        shapes={name: layer.shape for name, layer in layers.items()},
        peft_names={name: layer.peft_name for name, layer in layers.items()},
        stored={name: layer.stored for name, layer in layers.items()},
    )


def _named_layers(family: Family) -> Iterator[tuple[str, LoraLayer]]:
    shapes = families.layer_shapes(family)
    locations = ldm.unet_locations([f"{path}.weight" for path in shapes], families.config(family, "unet"))
    for path, shape in shapes.items():
        location = locations[f"{path}.weight"]
        for name in unet_names(path, location):
            yield name, LoraLayer(UNET, path, shape, f"unet.{path}", (location,))
    clips = CLIPS[family]
    for clip, prefixes in zip(clips, _TEXT_PREFIXES[len(clips)], strict=True):
        yield from _text_layers(family, clip, prefixes)


def _text_layers(family: Family, clip: ClipEncoder, prefixes: tuple[str, ...]) -> Iterator[tuple[str, LoraLayer]]:
    with torch.device("meta"):
        shapes = layer_shapes(families.empty_text_encoder(family, clip.part))
    for path, shape in shapes.items():
        # Only some versions of transformers have the first part of these paths.
        in_file = f"text_model.{path.removeprefix('text_model.')}" if path != "text_projection" else path
        key = f"{path}.weight"
        stored = tuple(clip.locations([key], prefix)[key] for prefix in clip.prefixes)
        for prefix in prefixes:
            yield kohya_name(prefix + in_file), LoraLayer(clip.part, path, shape, f"{clip.part}.{in_file}", stored)
