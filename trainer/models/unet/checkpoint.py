"""A checkpoint of SD1.5, SD2.x or SDXL: one file as ComfyUI has it, a diffusers folder, or the embedded tiny one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ....tcd import DiscreteSchedule, Prediction, scaled_linear_alpha_bar, zero_terminal_snr
from ...config.settings import BaseConfig
from ...errors import UserError
from .. import TINY_NAME
from ..conditioning import Conditioning
from ..fingerprint import fingerprint
from ..seam import LatentFormat
from . import families
from .autoencoder import Vae
from .families import Family
from .folder import Folder
from .model import UNetModel
from .single_file import SingleFile
from .text import CLIPS, MAX_TOKENS, TextEncoder

TINY = Path(__file__).parents[2] / "tiny" / TINY_NAME
_PREDICTION_NAMES = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}


class UNetCheckpoint:
    """A model on disk whose UNet can be distilled: recognized, and not read yet."""

    def __init__(self, base: BaseConfig) -> None:
        """Open what `base` names, and settle what it is.

        Raises UserError if nothing is there, the file is damaged, it belongs to no family that can be distilled, or it
        is to predict eps at zero terminal SNR.
        """
        self._source = _open(base.path)
        self._vae_source = _open(base.vae) if base.vae else self._source
        self.path = self._source.path
        self.name = self.path.stem if self.path.is_file() else self.path.name
        self.family: Family = self._source.family()
        notes: list[str] = []
        self.prediction = self._settle_prediction(base.prediction, notes)
        self.zero_snr = self._settle_zero_snr(base.zero_snr, notes)
        self.notes = tuple(notes)
        alpha_bar = scaled_linear_alpha_bar()
        self.schedule = DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar) if self.zero_snr else alpha_bar)
        config = families.config(self.family, "unet")
        self.latents = LatentFormat(channels=config["in_channels"], stride=8)
        self.resolution: int = self.latents.stride * config["sample_size"]

    def describe(self) -> str:
        """Say what the model is, as in `sd15, predicts eps`."""
        return f"{self.family}, predicts {self.prediction}{', zero terminal SNR' if self.zero_snr else ''}"

    def check_encoders(self) -> None:
        """Raise UserError if a text encoder is missing or, unless base.vae names one, the VAE."""
        self._source.check_encoders(vae=self._vae_source is self._source)

    def load(self, dtype: torch.dtype, device: torch.device) -> UNetModel:
        """Load the UNet, frozen, with weights in dtype; on the meta device it gets shapes and no data.

        Raises UserError if the checkpoint is not complete.
        """
        unet = self._empty_unet(dtype) if device.type == "meta" else self._source.unet(dtype).to(device)
        return UNetModel(unet.requires_grad_(False).eval(), self.schedule.to(device), self.prediction)

    def load_text_encoder(self, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """Load the text encoders, frozen, with weights in dtype.  Raises UserError if one is not complete."""
        if device.type == "meta":
            with torch.device("meta"):
                models = [families.empty_text_encoder(self.family, clip.part) for clip in CLIPS[self.family]]
            return TextEncoder(self.family, models).to(dtype)
        return self._source.text_encoder(dtype).requires_grad_(False).eval().to(device)

    def load_autoencoder(self, device: torch.device) -> Vae:
        """Load the VAE, frozen, in float32.  Raises UserError if it is not complete."""
        if device.type == "meta":
            with torch.device("meta"):
                vae = families.empty_vae(self.family)
        else:
            vae = self._vae_source.vae(self.family).to(device)
        return Vae(vae.requires_grad_(False).eval())

    def collate(self, captions: Sequence[Conditioning], sizes: Tensor) -> Conditioning:
        """Join rows of 77 tokens; a UNet with pooled captions, SDXL's, also gets the sizes [B, 6] as time_ids."""
        joined = Conditioning.cat(captions)
        if "pooled" not in joined.tensors:
            return joined
        return Conditioning({**joined.tensors, "time_ids": sizes.float()})

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Conditioning of the usual shape without content, to measure memory with."""
        config = families.config(self.family, "unet")
        context = torch.empty(rows, MAX_TOKENS, config["cross_attention_dim"], device=device)
        if config.get("addition_embed_type") != "text_time":
            return Conditioning.of(context=context)
        # The projection takes six numbers, each embedded, and beside them the caption as one vector.
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pooled, sizes = torch.empty(rows, width, device=device), torch.empty(rows, 6, device=device)
        return Conditioning.of(context=context, pooled=pooled, time_ids=sizes)

    @cached_property
    def _fingerprints(self) -> Mapping[str, str]:
        found = {"the base": fingerprint(self.path)}
        if self._vae_source is not self._source:
            found["the VAE"] = fingerprint(self._vae_source.path)
        return found

    def fingerprints(self) -> Mapping[str, str]:
        """A hash of the content of the base and, where base.vae names one, of the VAE."""
        return self._fingerprints

    def lora_metadata(self) -> Mapping[str, str]:
        """What a LoRA file for this model says of it, for other tools."""
        metadata = {
            "modelspec.architecture": f"{self._architecture()}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": _PREDICTION_NAMES[self.prediction],
            "ss_base_model_version": self._kohya_version(),
            "ss_v2": str(self.family == "sd2"),
            "ss_zero_terminal_snr": str(self.zero_snr),
        }
        if self.path.is_file():
            metadata["ss_sd_model_name"] = self.path.name
            metadata["ss_sd_model_hash"] = _short_hash(self.path)
        return metadata

    def _empty_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        with torch.device("meta"):
            unet: Any = families.empty_unet(self.family)
        torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns of modules that stay float32, and has none
        return unet

    def _settle_prediction(self, wanted: str, notes: list[str]) -> Prediction:
        """The owner's word, else the model's own, else what such models mostly predict."""
        known: dict[str, Prediction] = {"eps": "eps", "v": "v"}
        said, how = self._source.prediction()
        predicts = known.get(wanted, said)
        if predicts is None:
            other = "set base.prediction to v if it is a v-prediction model"
            notes.append(f"{self.path.name} does not say what its UNet predicts: eps is assumed; {other}")
            return "eps"
        if wanted == "auto" and "ComfyUI" in how:
            notes.append(f"{predicts} is what the UNet predicts according to {how}; set base.prediction if it is wrong")
        return predicts

    def _settle_zero_snr(self, wanted: str, notes: list[str]) -> bool:
        """Whether the schedule ends without any signal: the owner's word, else the model's own, else it does not."""
        zero = {"yes": True, "no": False}.get(wanted, self._source.zero_snr())
        if zero is None and self.prediction != "eps":
            other = "set base.zero_snr to yes if it is a zero terminal SNR model"
            notes.append(f"{self.path.name} does not speak of zero terminal SNR: none is assumed; {other}")
        if zero and self.prediction == "eps":
            raise UserError(
                f"{self.path} is to predict eps at zero terminal SNR, where x at timestep 999 is noise alone, and eps "
                'says nothing of the picture: such a model predicts v (set base.prediction = "v"), or is none '
                '(set base.zero_snr = "no")'
            )
        return bool(zero)

    def _architecture(self) -> str:
        """The family's name in the model specification of Stability AI."""
        if self.family == "sd2":
            return "stable-diffusion-v2-768-v" if self.prediction == "v" else "stable-diffusion-v2-512"
        known = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
        return known.get(self.family, f"{self.family}-sd")

    def _kohya_version(self) -> str:
        """The family's name in kohya's files."""
        if self.family == "sd2":
            return "sd_v2_v" if self.prediction == "v" else "sd_v2"
        return {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}.get(self.family, f"{self.family}_sd")


def _open(path: str) -> SingleFile | Folder:
    source = TINY if path == "tiny" else Path(path).expanduser()
    if not source.exists():
        raise UserError(f"there is no model at {source}: give a .safetensors checkpoint, a diffusers folder, or tiny")
    return Folder(source) if source.is_dir() else SingleFile(source)


def _short_hash(path: Path) -> str:
    """The short model hash by which web interfaces know a checkpoint: of 64 KiB from the second MiB on."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
