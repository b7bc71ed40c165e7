"""A model of ComfyUI's on disk: a checkpoint, or a network with text encoders and a VAE in files of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ....tcd import Schedule
from ....tcd.distill.distilled import distilled_note
from ....tcd.files.safetensors_file import SafetensorsFile
from ....tcd.fingerprint import combined
from ....tcd.lora_metadata import BASE_FINGERPRINT_KEY, BASE_NAME_KEY, HOST_FAMILIES
from ...config.base import BaseConfig
from ...errors import UserError
from ..base_loras import fingerprints_with, lora_note
from ..conditioning import Conditioning
from ..fingerprint import fingerprint
from ..framing import Framing
from ..seam import Fingerprints
from .autoencoder import HostAutoencoder, latents_of
from .base_loras import HostLoras
from .conditioning import join
from .library import find_model, load_comfyui
from .model import HostModel
from .recognize import META, TEXT, VAE, recognize, unquantised
from .text_encoder import HostTextEncoder, skip_layers

_RESOLUTIONS = {"SD15": 512, "SD20": 768}
_OTHER_RESOLUTION = 1024
_LONG_CAPTION = "a word " * 100
"""With more tokens than almost any caption has."""


class HostCheckpoint:
    """A model on disk that ComfyUI can load; its weights are not loaded yet."""

    def __init__(self, base: BaseConfig) -> None:
        """Open the files that the section [base] names, and let ComfyUI recognize the network.

        Raises UserError if a file is missing, ComfyUI does not recognize the network, it cannot be trained, a LoRA
        does not fit it, or a setting is one of the other engine.
        """
        _check_settings(base)
        load_comfyui()
        from ....nodes.host.training import known_distillation
        from ....nodes.host.training.network import default_guidance

        self._base = base
        self._is_checkpoint = not base.model
        self.path = (
            find_model("checkpoints", base.path, "base.path")
            if self._is_checkpoint
            else find_model("diffusion_models", base.model, "base.model")
        )
        self.name = self.path.stem
        self._text_encoders = [find_model("text_encoders", name, "base.text_encoders") for name in base.text_encoders]
        self._vae = find_model("vae", base.vae, "base.vae") if base.vae else None
        self._config, model, self._is_quantised, self._float8, self._in_file = recognize(self.path)
        self._time_layer = check_trainable(self._config, model, self.path)
        self.guidance = default_guidance(model)
        self._loras = HostLoras(base.loras)
        if base.loras:
            self._loras.check(unquantised(self._config))
        self._sampling = model.model_sampling
        self.host_family = type(self._config).__name__
        self.latents = latents_of(self._config.latent_format)
        self.resolution = _RESOLUTIONS.get(self.host_family, _OTHER_RESOLUTION)
        names = [self.path.stem, *(Path(lora.path).stem for lora in base.loras)]
        if base.clip_skip and self.host_family not in HOST_FAMILIES.values():
            raise UserError(
                f"base.clip_skip is {base.clip_skip}, but {self.path} is {self.host_family}: leave it out, it is for "
                "SD1.5, SD2.x and SDXL"
            )
        self.notes = (*distilled_note(names, known_distillation(model, self.name)), *lora_note(base))

    @property
    def family(self) -> str:
        """ComfyUI's name of the architecture, such as Flux; for UNets that of the other engine, such as sdxl."""
        from ....nodes.host.model_name import TRAINER_FAMILIES

        return TRAINER_FAMILIES.get(self.host_family, self.host_family)

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of the host's model_sampling, with its tables on the CPU."""
        from ....nodes.host.model_schedule import schedule_of

        return schedule_of(self._sampling)

    @cached_property
    def _shift(self) -> float | None:
        from ....nodes.host.model_name import model_shift

        return model_shift(self._sampling)

    def describe(self) -> str:
        """Describe the model in one line, such as `Flux, loaded by ComfyUI, shift 1.15`."""
        parts = [f"{self.host_family}, loaded by ComfyUI"]
        parts += [] if self._shift is None else [f"shift {self._shift:g}"]
        parts += ["the guidance scale is an input"] if self.guidance is not None else []
        parts += [f"with {self._base.lora_names}"] if self._base.loras else []
        return ", ".join(parts)

    def check_encoders(self) -> None:
        """Raise UserError if the base has no text encoder or no VAE, or base.clip_type is unknown."""
        self._clip_type()
        if self._is_checkpoint:
            named = {TEXT: bool(self._text_encoders), VAE: self._vae is not None}
            missing = [part for part, is_named in named.items() if not is_named and part not in self._in_file]
            if missing:
                settings = {TEXT: "base.text_encoders and base.clip_type", VAE: "base.vae"}
                raise UserError(
                    f"{self.path} has no {' and no '.join(missing)}: use a full checkpoint, or set "
                    f"{' and '.join(settings[part] for part in missing)}"
                )
            return
        if not self._text_encoders:
            raise UserError(
                "base.text_encoders is empty: name the text encoder files of the model, as in the node Load CLIP"
            )
        if self._vae is None:
            raise UserError("base.vae is empty: name the VAE file of the model, as in the node Load VAE")

    def load(self, dtype: torch.dtype, device: torch.device) -> HostModel:
        """Load the network, frozen, with LoRAs merged; weights stored in 8 bits or fewer stay so."""
        patcher = self._load_patcher(dtype, device)
        if device != META:
            patcher = self._loras.merge_into_network(patcher)
        return HostModel(patcher, self._time_layer, self.latents)

    def load_text_encoder(self, device: torch.device) -> HostTextEncoder:
        """Load the text encoders, frozen, to compute in float32, as they do in the host.

        Weights are kept in float32; those of T5 and of language models, which the host keeps as they are stored, are
        converted layer by layer. Raises UserError if a text encoder is missing or not recognized.
        """
        import comfy.sd

        self.check_encoders()
        cpu = torch.device("cpu")
        options = {"dtype": torch.float32, "load_device": device, "offload_device": cpu}
        if device == META:  # the weights alone: the host would ask its devices for their free memory
            options |= {"load_device": cpu, "initial_device": device}
        if self._text_encoders:
            kind = self._clip_type()
            paths = [str(path) for path in self._text_encoders]
            clip = comfy.sd.load_clip(paths, clip_type=kind, model_options=options)
            _check_text_encoders(clip, self._text_encoders)
        else:
            _, clip, *_ = comfy.sd.load_checkpoint_guess_config(
                str(self.path), output_model=False, output_vae=False, te_model_options=options
            )
            if clip is None:
                raise UserError(f"{self.path} has no text encoder: name files in base.text_encoders")
        if device != META:
            clip = self._loras.merge_into_text_encoder(clip)
        if self._base.clip_skip:
            skip_layers(clip, self._base.clip_skip)
        return HostTextEncoder(clip)

    def load_autoencoder(self, device: torch.device) -> HostAutoencoder:
        """Load the VAE, frozen, in float32. Raises UserError if there is none."""
        import comfy.sd
        import comfy.utils

        self.check_encoders()
        path = self._vae or self.path
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        if self._vae is None:
            prefixes = dict.fromkeys(self._config.vae_key_prefix, "")
            state = comfy.utils.state_dict_prefix_replace(state, prefixes, filter_keys=True)
            state = self._config.process_vae_state_dict(state)
        # On the meta device the weights are loaded all the same: only they tell the host which VAE it is.
        place = torch.device("cpu") if device == META else device
        vae = comfy.sd.VAE(sd=state, metadata=metadata, device=place, dtype=torch.float32)
        if vae.first_stage_model is None:
            raise UserError(f"{path} has no VAE that ComfyUI recognizes: name one in base.vae")
        return HostAutoencoder(vae, self._config.latent_format)

    def collate(self, captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
        """Join encoded captions, padded to the longest; the network gets each row at its own length.

        The host gives SDXL the sizes of a picture from its latent and the CONDITIONING, so the framing is not used.
        """
        return join(captions)

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Return conditioning of a long caption with arbitrary content, for measuring memory.

        It is what the text encoders return on the meta device, where they need no weights.
        """
        return join([self._long_caption] * rows).to(device)

    @cached_property
    def _long_caption(self) -> Conditioning:
        (encoded,) = self.load_text_encoder(META).encode([_LONG_CAPTION])
        return Conditioning({name: torch.zeros_like(value, device="cpu") for name, value in encoded.tensors.items()})

    @cached_property
    def _fingerprints(self) -> Fingerprints:
        base = combined(map(fingerprint, [self.path, *self._text_encoders]))
        plain = Fingerprints(base, fingerprint(self._vae) if self._vae else None)
        return fingerprints_with(self._loras.placed, plain)

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints of the network with its text encoders, and of the VAE if it has its own file."""
        return self._fingerprints

    def lora_metadata(self) -> Mapping[str, str]:
        """Return the metadata about this model for a LoRA file."""
        from ....nodes.host.model_name import model_metadata

        about_model = model_metadata(self.host_family, self._shift, self._time_layer)
        return {**about_model, BASE_FINGERPRINT_KEY: fingerprint(self.path), BASE_NAME_KEY: self.path.name}

    def _clip_type(self) -> Any:
        """Return the host's value for base.clip_type; None if it is not set. Raises UserError for an unknown name."""
        import comfy.sd

        name = self._base.clip_type
        known = {each.name.lower(): each for each in comfy.sd.CLIPType}
        if name and name.lower() not in known:
            raise UserError(f"base.clip_type is {name}: use one of {', '.join(known)}")
        return known.get(name.lower())

    def _load_patcher(self, dtype: torch.dtype, device: torch.device) -> Any:
        import comfy.model_patcher
        import comfy.sd

        if device == META:
            model = recognize(self.path, dtype).model
            return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
        options: dict[str, Any] = {"load_device": device, "offload_device": device}
        if self._float8 or not self._is_quantised:  # unless it is told, the host chooses by the memory that is free
            options["dtype"] = self._float8 or dtype
        if self._is_checkpoint:
            return comfy.sd.load_checkpoint_guess_config(
                str(self.path), output_vae=False, output_clip=False, model_options=options, disable_dynamic=True
            )[0]
        return comfy.sd.load_diffusion_model(str(self.path), model_options=options, disable_dynamic=True)


def _check_settings(base: BaseConfig) -> None:
    """Raise UserError if a setting is given that ComfyUI has no place for: it reads these facts from the file."""
    markers = {"prediction": "v_pred", "zero_snr": "ztsnr"}
    for key, marker in markers.items():
        value = getattr(base, key)
        if value != "auto":
            raise UserError(
                f"base.{key} is {value}, but ComfyUI reads this from the file, for SDXL from its tensor {marker}: "
                f"leave base.{key} out, or use base.engine=diffusers, if it loads this model"
            )


def _check_text_encoders(clip: Any, files: Sequence[Path]) -> None:
    """Raise UserError if a file has no weight of the text encoders; ComfyUI then leaves random numbers in them."""
    names = list(clip.cond_stage_model.state_dict())
    for file in files:
        stored = SafetensorsFile(file).shapes
        if not any(f".{name}".endswith(f".{each}") for each in stored for name in names):
            raise UserError(
                f"base.text_encoders has {file}, which ComfyUI does not recognize as a text encoder: name the files "
                "that its node Load CLIP takes"
            )


def check_trainable(config: Any, model: Any, path: Path) -> str:
    """Return the path of the layer whose output is the embedding of t.

    config: the host's supported_models config. model: its BaseModel, which may be on the meta device. Raises UserError
    if the model is of a kind that cannot be trained.
    """
    from ....nodes.host.training import time_layer_of

    try:
        return time_layer_of(model)
    except ValueError as error:
        raise UserError(f"{path} is {type(config).__name__}, which cannot be trained: {error}") from error
