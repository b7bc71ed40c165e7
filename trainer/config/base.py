"""The settings of the model to distill, the section [base]."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..user_path import user_path
from .schema import PATH, number


@dataclass(frozen=True, kw_only=True)
class BaseLora:
    """A LoRA on the model to distill: a table `[[base.loras]]`."""

    path: str = field(metadata=PATH)
    """A LoRA file. With the engine `comfyui`, its name in ComfyUI's folder `loras` is enough."""
    strength: float = number(1.0, -100.0, 100.0)
    """Its strength, as in the node Load LoRA, for the network and the text encoders."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The model to distill."""

    path: str = field(default="", metadata=PATH)
    """A single-file checkpoint or a diffusers folder of SD1.5, SD2.x or SDXL, or `tiny`, the embedded tiny model. With
    the engine `comfyui`: any checkpoint that ComfyUI loads, by its path or its name in ComfyUI's folders."""
    model: str = field(default="", metadata=PATH)
    """Instead of `path`: the file of a network alone, as the node Load Diffusion Model takes it."""
    text_encoders: tuple[str, ...] = field(default=(), metadata=PATH)
    """With the engine `comfyui`: the files of the text encoders, as the node Load CLIP takes them; needed with
    `model`."""
    clip_type: str = ""
    """With `text_encoders`: the type that the node Load CLIP is set to, such as `flux`."""
    vae: str = field(default="", metadata=PATH)
    """File or folder of a VAE to use instead of the base's own; needed with `model`."""
    loras: tuple[BaseLora, ...] = ()
    """Your own LoRAs, each a table `[[base.loras]]`. They are merged into the base, so that the teacher is the base
    with them. Use the LoRA that is trained together with them, at the same strengths."""
    engine: Literal["auto", "diffusers", "comfyui"] = "auto"
    """What loads the model: `diffusers`, for SD1.5, SD2.x and SDXL, or `comfyui`, your ComfyUI, for every model that it
    samples. `auto` is diffusers for the models that it can load, if it is installed, and otherwise comfyui."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What the UNet predicts. `auto` reads it from the model; if the model does not say, it is eps."""
    zero_snr: Literal["auto", "yes", "no"] = "auto"
    """Whether the noise schedule ends at zero SNR. `auto` reads it from the model; if the model does not say, it is
    no."""
    clip_skip: int = number(0, 0, 32)
    """The layer of the text encoder that is used, counted from the last, as in the node CLIP Set Last Layer without
    its sign: 2 for most anime models of SD1.5. With 0 it is the family's own: 1 for SD1.5, 2 for SD2.x and SDXL."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen weights of the network. `auto` is bfloat16 on a GPU that has it, float16 on other GPUs and
    float32 on a CPU. The adapter, the text encoders and the VAE are always float32."""

    def __post_init__(self) -> None:
        if self.path and self.model:
            raise UserError(f"base.path is {self.path} and base.model is {self.model}: set only one of them")
        if not (self.path or self.model):
            raise UserError("base.path is missing: name a checkpoint, or the file of a network alone in base.model")
        if self.text_encoders and not self.clip_type:
            raise UserError("base.clip_type is missing: base.text_encoders needs the type of the node Load CLIP")
        if self.clip_type and not self.text_encoders:
            raise UserError(f"base.clip_type is {self.clip_type}, but base.text_encoders is empty: set both or neither")
        if self.engine == "diffusers":
            self.refuse_comfyui_keys()

    def refuse_comfyui_keys(self) -> None:
        """Raise UserError if a key is set that only the engine comfyui takes."""
        for key in ("model", "text_encoders"):
            if getattr(self, key):
                raise UserError(
                    f"base.{key} is set, which only the engine comfyui takes: set base.engine=comfyui, or leave it out"
                )

    def absolute(self) -> BaseConfig:
        """Return the settings with absolute paths, so that they name the same files from any folder.

        Names of files that are not there stay: they may be names in ComfyUI's folders.
        """
        return replace(
            self,
            path=self.path if self.path == "tiny" else _absolute(self.path),
            model=_absolute(self.model),
            text_encoders=tuple(map(_absolute, self.text_encoders)),
            vae=_absolute(self.vae),
            loras=tuple(replace(lora, path=_absolute(lora.path)) for lora in self.loras),
        )

    @property
    def file(self) -> str:
        """The setting that names the model."""
        return self.path or self.model

    @property
    def lora_names(self) -> str:
        """The file names and strengths of `loras`, such as `my-style.safetensors at 0.8`; empty without any."""
        return ", ".join(f"{Path(lora.path).name} at {lora.strength:g}" for lora in self.loras)


def _absolute(name: str) -> str:
    path = user_path(name)
    return os.path.abspath(path) if name and path.exists() else name
