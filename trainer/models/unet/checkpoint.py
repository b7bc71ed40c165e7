"""A checkpoint of SD1.5, SD2.x or SDXL: a single file, a diffusers folder, or the embedded tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ....tcd import DiscreteSchedule, Prediction, scaled_linear_alpha_bar, zero_terminal_snr
from ....tcd.distill.distilled import distilled_note
from ....tcd.lora_metadata import BASE_FINGERPRINT_KEY, BASE_NAME_KEY, FAMILY_KEY, HOST_FAMILIES
from ...config.base import BaseConfig
from ...errors import UserError
from ...user_path import user_path
from .. import TINY_NAME
from ..base_loras import fingerprints_with, lora_note
from ..conditioning import Conditioning
from ..fingerprint import fingerprint
from ..framing import Framing
from ..seam import Fingerprints, LatentFormat
from . import families
from .autoencoder import Vae
from .base_loras import MergedLoras
from .conditioning import join
from .families import Family
from .folder import DiffusersFolder
from .lora_layouts import UNET
from .model import UNetModel
from .prompt import MAX_TOKENS
from .single_file import SingleFile
from .text import CLIPS, TextEncoder, check_clip_skip

TINY_PATH = Path(__file__).parents[2] / "tiny" / TINY_NAME
_LONG_CAPTION = 3 * MAX_TOKENS
"""Length of a caption of up to 225 tokens, longer than almost any."""
_PREDICTION_NAMES = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}


class UNetCheckpoint:
    """A model on disk with a UNet of a supported family; its weights are not loaded yet."""

    guidance: float | None = None

    def __init__(self, base: BaseConfig) -> None:
        """Open the model at base.path, and determine its family, prediction and schedule.

        Raises UserError if there is no model, the file is damaged, the family is not supported, the model is said to
        predict eps at zero terminal SNR, a LoRA of base.loras does not fit, base.clip_skip names no layer, or a key
        is only for the other engine.
        """
        self._source = _open(base.path)
        self._vae_source = _open(base.vae) if base.vae else self._source
        self.path = self._source.path
        self.name = self.path.stem if self.path.is_file() else self.path.name
        self.family: Family = self._source.family()
        base.refuse_comfyui_keys()
        check_clip_skip(self.family, base.clip_skip)
        self._clip_skip = base.clip_skip
        notes: list[str] = []
        self.prediction = self._resolve_prediction(base.prediction, notes)
        self.zero_snr = self._resolve_zero_snr(base.zero_snr, notes)
        names = [self.name, *(Path(lora.path).stem for lora in base.loras)]
        self.notes = (*notes, *distilled_note(names, self._source.distillation()), *lora_note(base))
        self._loras, self._lora_names = MergedLoras(base.loras, self.family), base.lora_names
        alpha_bar = scaled_linear_alpha_bar()
        self.schedule = DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar) if self.zero_snr else alpha_bar)
        config = families.config(self.family, "unet")
        self.latents = LatentFormat(channels=config["in_channels"], stride=8)
        self.resolution: int = self.latents.stride * config["sample_size"]

    def describe(self) -> str:
        """Describe the model in one line, such as `sd15, predicts eps`."""
        loras = f", with {self._lora_names}" if self._lora_names else ""
        return f"{self.family}, predicts {self.prediction}{', zero terminal SNR' if self.zero_snr else ''}{loras}"

    def check_encoders(self) -> None:
        """Raise UserError if a text encoder is missing or, unless base.vae names one, the VAE."""
        self._source.check_encoders(vae=self._vae_source is self._source)

    def load(self, dtype: torch.dtype, device: torch.device) -> UNetModel:
        """Load the UNet, frozen, with weights in dtype and LoRAs merged; on the meta device only shapes are created.

        Raises UserError if the checkpoint is incomplete.
        """
        if device.type == "meta":
            unet = self._empty_unet(dtype)
        else:
            unet = self._source.unet(dtype).to(device)
            self._loras.merge_into(UNET, unet)
        return UNetModel(unet.requires_grad_(False).eval(), self.schedule.to(device), self.prediction)

    def load_text_encoder(self, device: torch.device) -> TextEncoder:
        """Load the text encoders, frozen, in float32. Raises UserError if one is incomplete."""
        if device.type == "meta":
            with torch.device("meta"):
                models = [families.empty_text_encoder(self.family, clip.part) for clip in CLIPS[self.family]]
            return TextEncoder(self.family, models)
        encoder = self._source.text_encoder().requires_grad_(False).eval().to(device)
        encoder.clip_skip = self._clip_skip
        for clip, model in zip(CLIPS[self.family], encoder.models(), strict=True):
            self._loras.merge_into(clip.part, model)
        return encoder

    def load_autoencoder(self, device: torch.device) -> Vae:
        """Load the VAE, frozen, in float32. Raises UserError if it is incomplete."""
        if device.type == "meta":
            with torch.device("meta"):
                vae = families.empty_vae(self.family)
        else:
            vae = self._vae_source.vae(self.family).to(device)
            if self._vae_source is not self._source:  # the network expects its family's scale, whatever this VAE's is
                vae.register_to_config(scaling_factor=families.config(self.family, "vae")["scaling_factor"])
        return Vae(vae.requires_grad_(False).eval())

    def collate(self, captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
        """Join encoded captions, as `join` does; for SDXL, add the framing as `time_ids`, [B, 6]."""
        batch = join(captions)
        if "pooled" not in batch.tensors:
            return batch
        time_ids = torch.cat([framing.original, framing.crop, framing.target], dim=1).float()
        return Conditioning({**batch.tensors, "time_ids": time_ids})

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Return conditioning of long captions with arbitrary content, for measuring memory."""
        config = families.config(self.family, "unet")
        context = torch.empty(rows, _LONG_CAPTION, config["cross_attention_dim"], device=device)
        if config.get("addition_embed_type") != "text_time":
            return Conditioning.of(context=context)
        # SDXL's vector conditioning is the pooled caption and six embedded sizes.
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pooled, sizes = torch.empty(rows, width, device=device), torch.empty(rows, 6, device=device)
        return Conditioning.of(context=context, pooled=pooled, time_ids=sizes)

    @cached_property
    def _fingerprints(self) -> Fingerprints:
        own_vae = self._vae_source is not self._source
        vae = fingerprint(self._vae_source.path) if own_vae else None
        return fingerprints_with(self._loras.placed, Fingerprints(fingerprint(self.path), vae))

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints of the base and, if base.vae is set, of the VAE."""
        return self._fingerprints

    def lora_metadata(self) -> Mapping[str, str]:
        """Return the metadata about this model for a LoRA file: modelspec.* of Stability AI, ss_* of kohya, tcd.*."""
        metadata = {
            "modelspec.architecture": f"{self._architecture()}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": _PREDICTION_NAMES[self.prediction],
            "tcd.prediction_type": self.prediction,
            BASE_FINGERPRINT_KEY: fingerprint(self.path),
            "ss_base_model_version": self._kohya_version(),
            "ss_v2": str(self.family == "sd2"),
            "ss_zero_terminal_snr": str(self.zero_snr),
        }
        if self.family in HOST_FAMILIES:  # the embedded tiny model is none of ComfyUI's
            metadata[FAMILY_KEY] = HOST_FAMILIES[self.family]
        if self.path.is_file():
            metadata[BASE_NAME_KEY] = self.path.name
            metadata["ss_sd_model_hash"] = _short_hash(self.path)
        return metadata

    def _empty_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        with torch.device("meta"):
            unet: Any = families.empty_unet(self.family)
        torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns about modules kept in float32; this UNet has none
        return unet

    def _resolve_prediction(self, setting: str, notes: list[str]) -> Prediction:
        """Return what the UNet predicts: base.prediction, else what the model says, else eps, which is most common."""
        settings: dict[str, Prediction] = {"eps": "eps", "v": "v"}
        stated, where = self._source.prediction()
        prediction = settings.get(setting, stated)
        if prediction is None:
            remedy = "set base.prediction to v if it is a v-prediction model"
            notes.append(f"{self.path.name} does not say what its UNet predicts: eps is assumed; {remedy}")
            return "eps"
        if setting == "auto" and "ComfyUI" in where:
            notes.append(
                f"{prediction} is what the UNet predicts according to {where}; set base.prediction if it is wrong"
            )
        return prediction

    def _resolve_zero_snr(self, setting: str, notes: list[str]) -> bool:
        """Whether the schedule has zero terminal SNR: base.zero_snr, else what the model says, else no."""
        zero = {"yes": True, "no": False}.get(setting, self._source.zero_snr())
        if zero is None and self.prediction != "eps":
            remedy = "set base.zero_snr to yes if it has it"
            notes.append(f"{self.path.name} does not say whether it has zero terminal SNR, so no is assumed; {remedy}")
        if zero and self.prediction == "eps":
            raise UserError(
                f"{self.path} is said to predict eps at zero terminal SNR, where x at timestep 999 is pure noise, and "
                'eps says nothing about the picture: a zero terminal SNR model predicts v (set base.prediction = "v"); '
                'if it is not one, set base.zero_snr = "no"'
            )
        return bool(zero)

    def _architecture(self) -> str:
        """Return the family's name in Stability AI's model specification, modelspec.architecture."""
        if self.family == "sd2":
            return "stable-diffusion-v2-768-v" if self.prediction == "v" else "stable-diffusion-v2-512"
        known = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
        return known.get(self.family, f"{self.family}-sd")

    def _kohya_version(self) -> str:
        """Return the family's name in kohya's LoRA files, ss_base_model_version."""
        if self.family == "sd2":
            return "sd_v2_v" if self.prediction == "v" else "sd_v2"
        return {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}.get(self.family, f"{self.family}_sd")


def _open(path: str) -> SingleFile | DiffusersFolder:
    source = TINY_PATH if path == "tiny" else user_path(path)
    if not source.exists():
        raise UserError(f"there is no model at {source}: give a .safetensors checkpoint, a diffusers folder, or tiny")
    return DiffusersFolder(source) if source.is_dir() else SingleFile(source)


def _short_hash(path: Path) -> str:
    """Return the short model hash that web UIs show for a checkpoint, a hash of 64 KiB from offset 1 MiB."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
