"""A model as diffusers has it: a folder of parts, each with its configuration and its weights.

Flows in: a path.  Flows out: its models, and what its scheduler's configuration says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ....tcd import Prediction
from ...errors import UserError
from . import families as bases
from .families import Family, Layout
from .text import CLIPS, TextEncoder

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Folder:
    """A diffusers folder: `unet/`, `vae/`, `text_encoder/`, of SDXL `text_encoder_2/`, and `scheduler/`."""

    def __init__(self, path: Path) -> None:
        """Look into the folder; nothing is read yet."""
        self.path = path

    def family(self) -> Family:
        """The family of the model, by its UNet's configuration.

        Raises UserError, which says what the folder is instead.
        """
        other = self._config("transformer").get("_class_name")
        if other:
            raise UserError(f"{self.path} has a {other}, not a UNet: {bases.CAN}")
        config = self._config("unet")
        if not config:
            raise UserError(f"{self.path} is not a diffusers folder: there is no unet/config.json in it")
        label = config.get("projection_class_embeddings_input_dim") or 0
        layout = Layout(config["in_channels"], config["block_out_channels"][0], config["cross_attention_dim"], label)
        return bases.recognize(layout, self.path)

    def prediction(self) -> tuple[Prediction | None, str]:
        """What the UNet predicts, if the scheduler's configuration says so.

        Raises UserError when the schedule is none of Stable Diffusion's.
        """
        scheduler = self._scheduler()
        known: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
        said = scheduler.get("prediction_type")
        if said is None:
            return None, ""
        if said not in known:
            raise UserError(f"{self.path} predicts {said!r}, according to its scheduler, not one of {', '.join(known)}")
        return known[said], "its scheduler"

    def zero_snr(self) -> bool | None:
        """Whether the scheduler's configuration has zero terminal SNR; None when it does not say."""
        found = self._scheduler().get("rescale_betas_zero_snr")
        return None if found is None else bool(found)

    def check_encoders(self, *, vae: bool) -> None:
        """Raise UserError when there is no text encoder in the folder or, if `vae`, no VAE."""
        for part in [clip.part for clip in CLIPS[self.family()]] + ["vae"] * vae:
            if not self._config(part):
                hint = "set base.vae to the file or the folder of a VAE" if part == "vae" else "use a whole folder"
                raise UserError(f"{self.path} has no {part}/config.json: {hint}")

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet with weights in `dtype`.  Raises UserError when it is not there, or not whole."""
        return self._load(UNet2DConditionModel, self.path / "unet", torch_dtype=dtype)

    def vae(self, family: Family) -> AutoencoderKL:
        """The VAE in float32.  Raises UserError when it is not there, or not whole; or not of that many channels."""
        folder = self.path if (self.path / "config.json").is_file() else self.path / "vae"  # a VAE by itself
        vae = self._load(AutoencoderKL, folder, torch_dtype=torch.float32)
        channels = bases.config(family, "vae")["latent_channels"]
        if vae.config.latent_channels != channels:
            raise UserError(f"{folder} has latents of {vae.config.latent_channels} channels, {family} has {channels}")
        return vae

    def text_encoder(self, dtype: torch.dtype) -> TextEncoder:
        """The text encoders with weights in `dtype`.  Raises UserError when one is not there, or not whole."""
        family = self.family()
        models = []
        for clip in CLIPS[family]:
            projects = "WithProjection" in bases.config(family, clip.part)["architectures"][0]
            kind = CLIPTextModelWithProjection if projects else CLIPTextModel
            models.append(self._load(kind, self.path / clip.part, dtype=dtype))
        return TextEncoder(family, models)

    def _load(self, kind: Any, folder: Path, **options: Any) -> Any:
        """Load a model; of weights that are there in fp16 alone, those."""
        weights = list(folder.glob("*.safetensors")) + list(folder.glob("*.bin"))
        if weights and all(".fp16." in file.name for file in weights):
            options["variant"] = "fp16"
        try:
            model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path} is not a whole diffusers folder: {error}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"{folder} is not whole: {len(missing)} tensors are missing, such as {missing[0]}")
        return model

    def _scheduler(self) -> dict[str, Any]:
        config = self._config("scheduler", "scheduler_config.json")
        name = config.get("_class_name", "")
        if name.startswith(("EDM", "FlowMatch")) or any(
            key in config and config[key] != value for key, value in _BETAS.items()
        ):
            found = {key: config.get(key) for key in _BETAS}
            raise UserError(f"{self.path} has another noise schedule than Stable Diffusion's: {name}, {found}")
        return config

    def _config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        path = self.path / part / name
        if not path.is_file():
            return {}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        return loaded
