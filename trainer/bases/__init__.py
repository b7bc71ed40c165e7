"""The model families that a teacher can belong to: their diffusers configurations, and models built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

Family = Literal["sd15", "tiny"]
ROOT = Path(__file__).parent


def config(family: Family, part: str) -> dict[str, Any]:
    """The configuration of one part (`unet`, `vae`, `text_encoder`) of a family."""
    loaded: dict[str, Any] = json.loads((ROOT / family / part / "config.json").read_text(encoding="utf-8"))
    return loaded


def empty_unet(family: Family) -> UNet2DConditionModel:
    """A UNet of the family with freshly initialized weights."""
    return UNet2DConditionModel.from_config(config(family, "unet"))


def empty_vae(family: Family) -> AutoencoderKL:
    """A VAE of the family with freshly initialized weights."""
    return AutoencoderKL.from_config(config(family, "vae"))


def empty_text_encoder(family: Family) -> CLIPTextModel:
    """A text encoder of the family with freshly initialized weights."""
    return CLIPTextModel(CLIPTextConfig(**config(family, "text_encoder")))
