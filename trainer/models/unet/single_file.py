"""A checkpoint as ComfyUI has it: UNet, VAE and text encoders in one .safetensors file.

Flows in: a path.  Flows out: its models, read tensor by tensor, so that memory never holds the weights twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from ....tcd import Prediction
from ...errors import UserError
from ...safetensors_file import SafetensorsFile
from . import families as bases
from . import ldm
from .families import Family, Layout
from .text import CLIPS, Clip, TextEncoder

log = logging.getLogger("trajectory-consistency")
_Model = TypeVar("_Model", bound=nn.Module)
_CONV_IN = ldm.UNET_PREFIX + "input_blocks.0.0.weight"
_CONTEXT = "attn2.to_k.weight"
_LABEL = ldm.UNET_PREFIX + "label_emb.0.0.weight"
# What is known of files that are no such checkpoint, by a part of a tensor's name.
_OTHERS = {
    "lora_": "a LoRA, not a checkpoint",
    "joint_blocks.": "an SD3 model",
    "double_blocks.": "a Flux model, or one built like it",
    "control_model.": "a ControlNet",
    "edm_mean": "Playground v2.5, whose noise schedule is EDM's",
    "edm_vpred.sigma_max": "a CosXL model, whose noise schedule is EDM's",
}
# Of SD2.x's last block: by the spread of this bias ComfyUI tells 768-v models from 512 ones, and so do we.
_SD2_BIAS = ldm.UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09


class SingleFile(SafetensorsFile):
    """An open checkpoint file, whose models are read tensor by tensor: memory never holds the weights twice."""

    def family(self) -> Family:
        """The family of the model, by its names and shapes alone.

        Raises UserError, which says what the file is instead.
        """
        for mark, other in _OTHERS.items():
            if any(mark in name for name in self.shapes):
                raise UserError(f"{self.path} is {other}: {bases.CAN}")
        widths = [
            shape[1]
            for name, shape in self.shapes.items()
            if name.startswith(ldm.UNET_PREFIX) and name.endswith(_CONTEXT)
        ]
        if _CONV_IN not in self.shapes or not widths:
            examples = ", ".join(sorted(self.shapes)[:3])
            raise UserError(
                f"{self.path} is no checkpoint of Stable Diffusion: it has no UNet under {ldm.UNET_PREFIX!r} "
                f"(its tensors: {examples} ...); {bases.CAN}"
            )
        channels, in_channels = self.shapes[_CONV_IN][:2]
        label = self.shapes[_LABEL][1] if _LABEL in self.shapes else 0
        return bases.recognize(Layout(in_channels, channels, widths[0], label), self.path)

    def prediction(self) -> tuple[Prediction | None, str]:
        """What the UNet predicts, if the file says so, and how it says so.

        v is what the marker `v_pred` stands for, epsilon or v what its metadata say; of SD2.x the weights tell.
        """
        if "v_pred" in self.shapes:
            return "v", "its v_pred marker"
        known: dict[str, Prediction] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
        said = self.metadata.get("modelspec.prediction_type", "")
        if said in known:
            return known[said], "its metadata"
        if self.shapes.get(_CONV_IN) and self.family() == "sd2" and _SD2_BIAS in self.shapes:
            spread = self.tensor(_SD2_BIAS).float().std(unbiased=False).item()
            return "v" if spread > _SD2_SPREAD else "eps", "its weights, as ComfyUI tells SD2.x models apart"
        return None, ""

    def zero_snr(self) -> bool | None:
        """Whether the file is marked as trained at zero terminal SNR; None, as there is no mark for the contrary."""
        return True if "ztsnr" in self.shapes else None

    def check_encoders(self, *, vae: bool) -> None:
        """Raise UserError when there is no text encoder in the file or, if `vae`, no VAE."""
        for clip in CLIPS[self.family()]:
            self._prefix_of(clip)
        if vae:
            self._vae_prefix()

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet with weights in `dtype`.  Raises UserError when it is not whole."""
        family = self.family()
        with init_empty_weights():
            model = bases.empty_unet(family)
        places = ldm.unet_places(model.state_dict(), model.config)
        self._warn_of_others(places)
        return self._fill(model, places, dtype, f"{family} unet")

    def vae(self, family: Family) -> AutoencoderKL:
        """The VAE in float32: SDXL's overflows in float16, and it runs once.

        Raises UserError when there is none, or not a whole one.
        """
        with init_empty_weights():
            model = bases.empty_vae(family)
        places = ldm.vae_places(model.state_dict(), model.config, self._vae_prefix())
        return self._fill(model, places, torch.float32, f"{family} vae")

    def text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """The text encoders with weights in `dtype`.  Raises UserError when one is not there, or not whole."""
        family = self.family()
        return TextEncoder(family, [self._clip(family, clip, dtype) for clip in CLIPS[family]])

    def _clip(self, family: Family, clip: Clip, dtype: torch.dtype) -> Any:
        with init_empty_weights(include_buffers=False):
            model = bases.empty_text_encoder(family, clip.part)
        places = clip.places(model.state_dict(), self._prefix_of(clip))
        for key, place in places.items():  # a projection that is written as transformers has it
            if place.transposed and f"{place.name}.weight" in self.shapes:
                places[key] = ldm.Place(f"{place.name}.weight")
        return self._fill(model, places, dtype, f"{family} {clip.part}")

    def _prefix_of(self, clip: Clip) -> str:
        for prefix in clip.prefixes:
            if self._has(prefix):
                return prefix
        raise UserError(
            f"{self.path} has no text encoder (no tensors under {clip.prefixes[0]!r}): use a full checkpoint"
        )

    def _vae_prefix(self) -> str:
        if "decoder.conv_in.weight" in self.shapes:  # a VAE by itself
            return ""
        if self._has(ldm.VAE_PREFIX):
            return ldm.VAE_PREFIX
        raise UserError(
            f"{self.path} has no VAE (no tensors under {ldm.VAE_PREFIX!r}): set base.vae to the file of one, "
            "or use a full checkpoint"
        )

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def _fill(self, model: _Model, places: Mapping[str, ldm.Place], dtype: torch.dtype, what: str) -> _Model:
        """Give `model`, which has no storage yet, its tensors from their places."""
        missing = [place.name for place in places.values() if place.name not in self.shapes]
        if missing:
            raise UserError(
                f"{self.path} does not hold a whole {what}: {len(missing)} of its {len(places)} tensors are missing, "
                f"such as {missing[0]}"
            )
        state = {}
        for key, empty in model.state_dict().items():
            try:
                part = places[key].read(self.tensor(places[key].name), empty.shape)
            except ValueError as error:
                raise UserError(f"{self.path} does not hold a {what}: {error}") from error
            state[key] = part.to(dtype, copy=True).contiguous()
        model.load_state_dict(state, assign=True)
        return model

    def _warn_of_others(self, places: Mapping[str, ldm.Place]) -> None:
        """Say so when the file's UNet has tensors that ours has no place for: it may be of a changed architecture."""
        known = {place.name for place in places.values()}
        others = [name for name in self.shapes if name.startswith(ldm.UNET_PREFIX) and name not in known]
        if others:
            log.warning("%s: %d tensors of its UNet are not used, such as %s", self.path, len(others), others[0])
