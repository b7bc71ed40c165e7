"""A model in a diffusers folder: one subfolder for each part, with its configuration and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ....tcd import Prediction
from ...errors import UserError
from . import families
from .families import Family, UNetSignature
from .text import CLIPS, TextEncoder

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class DiffusersFolder:
    """A diffusers folder: `unet/`, `vae/`, `text_encoder/`, `scheduler/`, and for SDXL `text_encoder_2/`."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path

    def family(self) -> Family:
        """Return the family of the model, from the configuration of its UNet.

        Raises UserError if it is not supported; the message says what the folder is instead.
        """
        transformer = self._config("transformer").get("_class_name")
        if transformer:
            raise families.UnknownModelError(f"{self.path} has a {transformer}, not a UNet: {families.SUPPORTED}")
        config = self._config("unet")
        if not config:
            raise UserError(f"{self.path} is not a diffusers folder: there is no unet/config.json in it")
        label = config.get("projection_class_embeddings_input_dim") or 0
        signature = UNetSignature(
            config["in_channels"], config["block_out_channels"][0], config["cross_attention_dim"], label
        )
        return families.recognize_family(signature, self.path)

    def prediction(self) -> tuple[Prediction | None, str]:
        """Return (what the UNet predicts, where the folder says so), or (None, "") if its scheduler does not say.

        Raises UserError if the scheduler has a different noise schedule than Stable Diffusion's.
        """
        scheduler = self._scheduler()
        names: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
        name = scheduler.get("prediction_type")
        if name is None:
            return None, ""
        if name not in names:
            raise UserError(f"{self.path} predicts {name!r}, according to its scheduler, not one of {', '.join(names)}")
        return names[name], "its scheduler"

    def zero_snr(self) -> bool | None:
        """Whether the scheduler's configuration has zero terminal SNR; None if it does not say."""
        rescaled = self._scheduler().get("rescale_betas_zero_snr")
        return None if rescaled is None else bool(rescaled)

    def check_encoders(self, *, vae: bool) -> None:
        """Raise UserError if the folder lacks a text encoder or, if `vae`, the VAE."""
        for part in [clip.part for clip in CLIPS[self.family()]] + ["vae"] * vae:
            if not self._config(part):
                hint = "set base.vae to the file or the folder of a VAE" if part == "vae" else "use a complete folder"
                raise UserError(f"{self.path} has no {part}/config.json: {hint}")

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the UNet with weights in `dtype`. Raises UserError if it is missing or incomplete."""
        return self._load(UNet2DConditionModel, self.path / "unet", torch_dtype=dtype)

    def vae(self, family: Family) -> AutoencoderKL:
        """Load the VAE in float32.

        Raises UserError if it is missing, incomplete, or has a different number of latent channels than `family`.
        """
        # The folder may also be that of a VAE only.
        folder = self.path if (self.path / "config.json").is_file() else self.path / "vae"
        vae = self._load(AutoencoderKL, folder, torch_dtype=torch.float32)
        channels = families.config(family, "vae")["latent_channels"]
        if vae.config.latent_channels != channels:
            raise UserError(f"{folder} has latents of {vae.config.latent_channels} channels, {family} has {channels}")
        return vae

    def text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """Load the text encoders with weights in `dtype`. Raises UserError if one is missing or incomplete."""
        family = self.family()
        models = []
        for clip in CLIPS[family]:
            projects = "WithProjection" in families.config(family, clip.part)["architectures"][0]
            kind = CLIPTextModelWithProjection if projects else CLIPTextModel
            models.append(self._load(kind, self.path / clip.part, dtype=dtype))
        return TextEncoder(family, models)

    def _load(self, kind: Any, folder: Path, **options: Any) -> Any:
        """Load a model of class `kind` from a subfolder; use the fp16 variant if there is no other."""
        weights = list(folder.glob("*.safetensors")) + list(folder.glob("*.bin"))
        if weights and all(".fp16." in file.name for file in weights):
            options["variant"] = "fp16"
        try:
            model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path} is not a complete diffusers folder: {error}") from error
        except (UnpicklingError, EOFError, KeyError) as error:
            # From torch.load, of a .bin file: diffusers turns it into an OSError, transformers does not. Its own
            # message is left out, because it recommends to load the file in a way that runs the code in it.
            raise UserError(
                f"{self.path} is not a complete diffusers folder: unable to load weights from a .bin file in {folder}, "
                "which is damaged or has more in it than tensors; use .safetensors files"
            ) from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"{folder} is not complete: {len(missing)} tensors are missing, such as {missing[0]}")
        return model

    def _scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration; raises UserError if its schedule is not Stable Diffusion's."""
        config = self._config("scheduler", "scheduler_config.json")
        name = config.get("_class_name", "")
        if name.startswith(("EDM", "FlowMatch")) or any(
            key in config and config[key] != value for key, value in _BETAS.items()
        ):
            betas = {key: config.get(key) for key in _BETAS}
            raise UserError(f"{self.path} has another noise schedule than Stable Diffusion's: {name}, {betas}")
        return config

    def _config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """Return the configuration of a part, {} if there is none; raises UserError if it is not JSON."""
        path = self.path / part / name
        if not path.is_file():
            return {}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        return loaded
