"""A single-file checkpoint, as ComfyUI uses it: UNet, VAE and text encoders in one .safetensors file."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from ....tcd import Prediction
from ....tcd.distill.distilled import refuse_lcm
from ....tcd.files.safetensors_file import SafetensorsFile, attached
from ...errors import UserError
from . import families, ldm
from .families import Family, UNetSignature
from .text import CLIPS, ClipEncoder, TextEncoder

log = logging.getLogger("trajectory-consistency")
_Model = TypeVar("_Model", bound=nn.Module)
_CONV_IN = ldm.UNET_PREFIX + "input_blocks.0.0.weight"
_INTEGERS = ("I8", "U8", "I32")
_CONTEXT = "attn2.to_k.weight"
_LABEL = ldm.UNET_PREFIX + "label_emb.0.0.weight"
_QUANTISED = 'a model with quantised weights, whose scales only ComfyUI reads (base.engine = "comfyui")'
# Unsupported files, by a substring of a tensor's name.
_UNSUPPORTED = {
    "lora_": "a LoRA, not a checkpoint",
    "joint_blocks.": "an SD3 model",
    "double_blocks.": "a Flux model, or one built like it",
    "control_model.": "a ControlNet",
    "edm_mean": "Playground v2.5, whose noise schedule is EDM's",
    "edm_vpred.sigma_max": "a CosXL model, whose noise schedule is EDM's",
    **dict.fromkeys(
        ("scale_weight", "weight_scale", "comfy_quant", "scaled_fp8"),
        _QUANTISED,
    ),
}
# Of these, a checkpoint of the same architecture has the same ones, also if it is damaged.
_BLOCK = re.compile(r"((in|out)put_blocks\.\d+\.\d+|middle_block\.\d+)(\.transformer_blocks\.\d+)?")
# SD2.x v-prediction models have a larger standard deviation of this bias: ComfyUI distinguishes them by it too.
_SD2_BIAS = ldm.UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_V_STD = 0.09


class SingleFile(SafetensorsFile):
    """An open checkpoint file. Models are filled tensor by tensor, so that memory never holds the weights twice."""

    def family(self) -> Family:
        """Return the family of the model, from the names and shapes of the tensors only.

        Raises UnknownModelError if it is not supported; the message says what the file is instead. Raises UserError if
        it is an LCM.
        """
        refuse_lcm(self.shapes, self.path)
        for part_of_name, what in _UNSUPPORTED.items():
            if any(part_of_name in name for name in self.shapes):
                raise families.UnknownModelError(f"{self.path} is {what}: {families.SUPPORTED}")
        if any(name.endswith(".weight") and dtype in _INTEGERS for name, dtype in self.dtypes.items()):
            raise families.UnknownModelError(f"{self.path} is {_QUANTISED}: {families.SUPPORTED}")
        widths = [
            self._size(name, 1) for name in self.shapes if name.startswith(ldm.UNET_PREFIX) and name.endswith(_CONTEXT)
        ]
        if _CONV_IN not in self.shapes or not widths:
            examples = ", ".join(sorted(self.shapes)[:3])
            raise families.UnknownModelError(
                f"{self.path} is no checkpoint of Stable Diffusion: it has no UNet under {ldm.UNET_PREFIX!r} "
                f"(its tensors: {examples} ...); {families.SUPPORTED}"
            )
        channels, in_channels = self._size(_CONV_IN, 0), self._size(_CONV_IN, 1)
        label = self._size(_LABEL, 1) if _LABEL in self.shapes else 0
        family = families.recognize_family(UNetSignature(in_channels, channels, widths[0], label), self.path)
        self._check_architecture(family)
        return family

    def _size(self, name: str, dim: int) -> int:
        """Return the size of a tensor in a dimension; raises UserError if it has no such dimension."""
        shape = self.shapes[name]
        if len(shape) <= dim:
            raise UserError(f"{self.path} has {name} in the shape {list(shape)}: it is damaged")
        return shape[dim]

    def _check_architecture(self, family: Family) -> None:
        """Raise UnknownModelError if the UNet has another tensor or lacks a block; `unet` misses single tensors.

        Raises UserError if a tensor changes what a weight means, because ComfyUI would leave it out too.
        """
        shapes = families.tensor_shapes(family)
        locations = ldm.unet_locations(shapes, families.config(family, "unet"))
        expected = {locations[key].name: shape for key, shape in shapes.items()}
        found = {name: shape for name, shape in self.shapes.items() if name.startswith(ldm.UNET_PREFIX)}
        self._refuse_attached(set(expected), f"{family} unet")
        other = sorted(name for name, shape in found.items() if expected.get(name) != shape)
        absent = sorted(_blocks(expected) - _blocks(found))
        if other or absent:
            parts = [f"{len(other)} tensors are others, such as {other[0]}"] if other else []
            parts += [f"it lacks {len(absent)} blocks, such as {absent[0]}"] if absent else []
            raise families.UnknownModelError(
                f"{self.path} has another UNet than {family}: {'; '.join(parts)}; {families.SUPPORTED}"
            )

    def distillation(self) -> str:
        """Return nothing: what the file says about being distilled is in its name alone."""
        return ""

    def prediction(self) -> tuple[Prediction | None, str]:
        """Return (what the UNet predicts, where the file says so), or (None, "") if the file does not say.

        Sources: a `v_pred` marker tensor; modelspec.prediction_type in the metadata; for SD2.x, its weights.
        """
        if "v_pred" in self.shapes:
            return "v", "its v_pred marker"
        names: dict[str, Prediction] = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
        name = self.metadata.get("modelspec.prediction_type", "")
        if name in names:
            return names[name], "its metadata"
        if self.shapes.get(_CONV_IN) and self.family() == "sd2" and _SD2_BIAS in self.shapes:
            std = self.tensor(_SD2_BIAS).float().std(unbiased=False).item()
            return "v" if std > _SD2_V_STD else "eps", "its weights, as ComfyUI distinguishes SD2.x models"
        return None, ""

    def zero_snr(self) -> bool | None:
        """Return True if the file has a `ztsnr` marker tensor, else None: there is no marker for the opposite."""
        return True if "ztsnr" in self.shapes else None

    def check_encoders(self, *, vae: bool) -> None:
        """Raise UserError if the file lacks a text encoder or, if `vae`, the VAE."""
        for clip in CLIPS[self.family()]:
            self._prefix_of(clip)
        if vae:
            self._vae_prefix()

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet with weights in `dtype`. Raises UserError if it is incomplete."""
        family = self.family()
        with init_empty_weights():
            model = families.empty_unet(family)
        locations = ldm.unet_locations(model.state_dict(), model.config)
        return self._load(model, locations, dtype, f"{family} unet", ldm.UNET_PREFIX)

    def vae(self, family: Family) -> AutoencoderKL:
        """Load the VAE in float32. Raises UserError if it is missing or incomplete."""
        with init_empty_weights():
            model = families.empty_vae(family)
        prefix = self._vae_prefix()
        locations = ldm.vae_locations(model.state_dict(), model.config, prefix)
        if f"{prefix}decoder.mid_block.resnets.0.conv1.weight" in self.shapes:
            locations = ldm.diffusers_vae_locations(model.state_dict(), self.shapes, prefix)
        return self._load(model, locations, torch.float32, f"{family} vae", prefix)

    def text_encoder(self) -> TextEncoder:
        """Load the text encoders in float32. Raises UserError if one is missing or incomplete."""
        family = self.family()
        return TextEncoder(family, [self._clip(family, clip) for clip in CLIPS[family]])

    def _clip(self, family: Family, clip: ClipEncoder) -> Any:
        with init_empty_weights(include_buffers=False):
            model = families.empty_text_encoder(family, clip.part)
        prefix = self._prefix_of(clip)
        locations = clip.locations(model.state_dict(), prefix)
        for key, location in locations.items():  # some files store the projection as transformers does
            if location.transposed and f"{location.name}.weight" in self.shapes:
                locations[key] = ldm.TensorLocation(f"{location.name}.weight")
        return self._load(model, locations, torch.float32, f"{family} {clip.part}", prefix)

    def _prefix_of(self, clip: ClipEncoder) -> str:
        for prefix in clip.prefixes:
            if self._has(prefix):
                return prefix
        raise UserError(
            f"{self.path} has no text encoder (no tensors under {clip.prefixes[0]!r}): use a full checkpoint"
        )

    def _vae_prefix(self) -> str:
        if "decoder.conv_in.weight" in self.shapes:  # a file that contains only a VAE
            return ""
        if self._has(ldm.VAE_PREFIX):
            return ldm.VAE_PREFIX
        raise UserError(
            f"{self.path} has no VAE (no tensors under {ldm.VAE_PREFIX!r}): set base.vae to the file of one, "
            "or use a full checkpoint"
        )

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def _load(
        self, model: _Model, locations: Mapping[str, ldm.TensorLocation], dtype: torch.dtype, what: str, prefix: str
    ) -> _Model:
        """Load the weights of `model`, which is on the meta device.

        what: its name for messages. prefix: of its tensors in the file.
        """
        missing = [location.name for location in locations.values() if location.name not in self.shapes]
        if missing:
            raise UserError(
                f"{self.path} does not hold a whole {what}: {len(missing)} of its {len(locations)} tensors "
                f"are missing, such as {missing[0]}"
            )
        used = {location.name for location in locations.values()}
        self._refuse_attached(used, what)
        unused = [name for name in self.shapes if name.startswith(prefix) and name not in used]
        if unused:
            log.info("%s: %d tensors are not part of its %s, such as %s", self.path.name, len(unused), what, unused[0])
        state = {}
        for key, meta in model.state_dict().items():
            try:
                part = locations[key].read(self.tensor(locations[key].name), meta.shape)
            except ValueError as error:
                raise UserError(f"{self.path} does not hold a {what}: {error}") from error
            state[key] = part.to(dtype, copy=True).contiguous()
        model.load_state_dict(state, assign=True)
        return model

    def _refuse_attached(self, used: set[str], what: str) -> None:
        """Raise UserError if a tensor that is not used changes what a used weight means."""
        found = attached(self.shapes, used)
        if found:
            raise UserError(
                f"{self.path} has {len(found)} tensors beside the weights of its {what} that are not used, such as "
                f'{found[0]}: use a file with plain weights, or base.engine = "comfyui" if ComfyUI uses them'
            )


def _blocks(names: Iterable[str]) -> set[str]:
    return {found.group() for name in names if (found := _BLOCK.search(name))}
