"""The supported model families: recognizing a UNet's family, and building the models of a family."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from .....tcd import adapter
from ....errors import UserError

Family = Literal["sd15", "sd2", "sdxl", "tiny"]
ROOT = Path(__file__).parent


class UNetSignature(NamedTuple):
    """Four widths of a UNet, which differ between the families."""

    in_channels: int
    """Input channels of the first convolution."""
    channels: int
    """Output channels of the first convolution."""
    context: int
    """Width of the text embedding."""
    label: int
    """Width of the vector conditioning, such as SDXL's pooled text and sizes; 0 for none."""


_FAMILIES: dict[UNetSignature, Family] = {
    UNetSignature(4, 320, 768, 0): "sd15",
    UNetSignature(4, 320, 1024, 0): "sd2",
    UNetSignature(4, 320, 2048, 2816): "sdxl",
    UNetSignature(4, 32, 32, 0): "tiny",
}
SUPPORTED = "SD1.5, SD2.x and SDXL models, whose UNet has 4 input channels, can be distilled"
_BY_INPUT_CHANNELS = {
    9: "an inpainting model",
    8: "a model that edits or animates a picture",
    7: "an upscaler",
    5: "a depth-to-image model",
}


class UnknownModelError(UserError):
    """The model is of no supported family; another engine may know it."""


def recognize_family(signature: UNetSignature, where: Path) -> Family:
    """Return the family of a UNet.

    Raises UnknownModelError if it belongs to no family; the message says what the model at `where` is instead.
    """
    if signature in _FAMILIES:
        return _FAMILIES[signature]
    channels = signature.in_channels
    if channels in _BY_INPUT_CHANNELS:
        raise UnknownModelError(f"{where} is {_BY_INPUT_CHANNELS[channels]} ({channels} input channels): {SUPPORTED}")
    if signature.context == 1280:
        guess = "an SDXL refiner"
    elif signature.context == 1024 and signature.label:
        guess = "an SD2.1 unCLIP model"
    else:
        guess = "of an unknown architecture"
    raise UnknownModelError(
        f"{where} is {guess} ({signature.channels} channels, text width {signature.context}): {SUPPORTED}"
    )


def config(family: Family, part: str) -> dict[str, Any]:
    """Return the diffusers or transformers configuration of a part: unet, vae, text_encoder or text_encoder_2."""
    loaded: dict[str, Any] = json.loads((ROOT / family / part / "config.json").read_text(encoding="utf-8"))
    return loaded


def empty_unet(family: Family) -> UNet2DConditionModel:
    """Build a UNet of the family with freshly initialized weights."""
    return UNet2DConditionModel.from_config(config(family, "unet"))


@cache
def tensor_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a family's UNet, by its name in diffusers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in empty_unet(family).state_dict().items()}


@cache
def layer_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Return the weight shape [out, in, ...], by path, of each layer of a family's UNet that can have a LoRA."""
    with torch.device("meta"):
        return adapter.layer_shapes(empty_unet(family))


def empty_vae(family: Family) -> AutoencoderKL:
    """Build a VAE of the family with freshly initialized weights."""
    return AutoencoderKL.from_config(config(family, "vae"))


def empty_text_encoder(family: Family, part: str = "text_encoder") -> PreTrainedModel:
    """Build a text encoder of the family with freshly initialized weights; SDXL's second one has a projection."""
    values = config(family, part)
    model = CLIPTextModelWithProjection if "WithProjection" in values["architectures"][0] else CLIPTextModel
    return model(CLIPTextConfig(**values))
