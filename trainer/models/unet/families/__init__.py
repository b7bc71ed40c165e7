"""The model families that a teacher can belong to: their diffusers configurations, and models built from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from .....tcd.adapter import layer_shape
from ....errors import UserError

Family = Literal["sd15", "sd2", "sdxl", "tiny"]
ROOT = Path(__file__).parent


class Layout(NamedTuple):
    """What tells the families' UNets apart."""

    in_channels: int
    channels: int
    """Of the first convolution's output."""
    context: int
    """Width of the text embedding."""
    label: int
    """Width of what is told beside the caption, such as SDXL's sizes; 0 for nothing."""


_FAMILIES: dict[Layout, Family] = {
    Layout(4, 320, 768, 0): "sd15",
    Layout(4, 320, 1024, 0): "sd2",
    Layout(4, 320, 2048, 2816): "sdxl",
    Layout(4, 32, 32, 0): "tiny",
}
CAN = "SD1.5, SD2.x and SDXL models, whose UNet has 4 input channels, can be distilled"
_INPUTS = {9: "an inpainting model", 8: "a model that edits or animates a picture", 5: "a depth-to-image model"}


def recognize(layout: Layout, where: Path) -> Family:
    """Tell the family of a UNet.

    Raises UserError, which says what the model at `where` is instead, for a UNet that is of none of them.
    """
    if layout in _FAMILIES:
        return _FAMILIES[layout]
    if layout.in_channels in _INPUTS:
        raise UserError(f"{where} is {_INPUTS[layout.in_channels]} ({layout.in_channels} input channels): {CAN}")
    if layout.context == 1280:
        guess = "an SDXL refiner"
    elif layout.context == 1024 and layout.label:
        guess = "an SD2.1 unCLIP model"
    else:
        guess = "of an unknown architecture"
    raise UserError(f"{where} is {guess} ({layout.channels} channels, text width {layout.context}): {CAN}")


def config(family: Family, part: str) -> dict[str, Any]:
    """The configuration of one part (`unet`, `vae`, `text_encoder`, `text_encoder_2`) of a family."""
    loaded: dict[str, Any] = json.loads((ROOT / family / part / "config.json").read_text(encoding="utf-8"))
    return loaded


def empty_unet(family: Family) -> UNet2DConditionModel:
    """A UNet of the family with freshly initialized weights."""
    return UNet2DConditionModel.from_config(config(family, "unet"))


@cache
def layer_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """The weight shapes [out, in, ...] of all layers of a family's UNet that a LoRA can be beside, by path."""
    with torch.device("meta"):
        unet = empty_unet(family)
    found = {path: layer_shape(module) for path, module in unet.named_modules()}
    return {path: shape for path, shape in found.items() if shape is not None}


def empty_vae(family: Family) -> AutoencoderKL:
    """A VAE of the family with freshly initialized weights."""
    return AutoencoderKL.from_config(config(family, "vae"))


def empty_text_encoder(family: Family, part: str = "text_encoder") -> PreTrainedModel:
    """A text encoder of the family with freshly initialized weights: with a projection where the UNet is told of it."""
    values = config(family, part)
    model = CLIPTextModelWithProjection if "WithProjection" in values["architectures"][0] else CLIPTextModel
    return model(CLIPTextConfig(**values))
