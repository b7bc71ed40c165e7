"""A model in a diffusers folder: one subfolder for each part, with its configuration and its weights."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ....tcd import Prediction
from ....tcd.distill.distilled import refuse_lcm
from ....tcd.files.safetensors_file import attached
from ...errors import UserError
from . import families
from .families import Family, UNetSignature
from .text import CLIPS, TextEncoder

log = logging.getLogger("trajectory-consistency")
# Stable Diffusion's noise schedule, in the keys of a scheduler. The other keys are about sampling alone.
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "timestep_type": "discrete",
}
# Keys of a UNet that change no prediction, or only its rounding.
_FREE_UNET_KEYS = {"sample_size", "dropout", "upcast_attention"}
# Keys of a VAE for latents that are more than scaled.
_VAE_STATISTICS = ("latents_mean", "latents_std", "shift_factor")
_DISTILLED = ("LCMScheduler", "TCDScheduler")
_SHARD = r"(?:-\d+-of-\d+)?"
# The first group is the variant; the number of the shard is before it, or, in older files, behind it.
_WEIGHTS = re.compile(
    rf"(?:(?:diffusion_)?pytorch_)?model{_SHARD}\.(?:([\w-]+?){_SHARD}\.)?(?:safetensors|bin)", re.ASCII
)


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
        family = families.recognize_family(self._signature(config), self.path)
        if config.get("time_cond_proj_dim"):
            refuse_lcm(["time_embedding.cond_proj.weight"], self.path)
        others = _differences(config, families.config(family, "unet"))
        if others:
            raise families.UnknownModelError(
                f"{self.path} has another UNet than {family}. In unet/config.json, {'; '.join(others)}: "
                f'{families.SUPPORTED}; if ComfyUI loads its single file, use that with base.engine = "comfyui"'
            )
        return family

    def _signature(self, config: Mapping[str, Any]) -> UNetSignature:
        full = _defaults(UNet2DConditionModel) | dict(config)
        label = full["projection_class_embeddings_input_dim"] or 0
        try:
            numbers = full["in_channels"], full["block_out_channels"][0], full["cross_attention_dim"], label
            return UNetSignature(*map(int, numbers))
        except (TypeError, ValueError, LookupError) as error:
            raise families.UnknownModelError(
                f"{self.path} has a unet/config.json of an unknown architecture ({error}): {families.SUPPORTED}"
            ) from error

    def distillation(self) -> str:
        """Return what the folder says about being distilled to few steps; empty if it does not."""
        name = self._scheduler().get("_class_name", "")
        return f"its scheduler is {name}" if name in _DISTILLED else ""

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
        beyond = [key for key in _VAE_STATISTICS if vae.config.get(key) is not None]
        if beyond:
            raise UserError(
                f"{folder}/config.json has {beyond[0]}, which {family} has no use for: use a VAE of {family}"
            )
        channels = families.config(family, "vae")["latent_channels"]
        if vae.config.latent_channels != channels:
            raise UserError(f"{folder} has latents of {vae.config.latent_channels} channels, {family} has {channels}")
        return vae

    def text_encoder(self) -> TextEncoder:
        """Load the text encoders in float32. Raises UserError if one is missing or incomplete."""
        family = self.family()
        models = []
        for clip in CLIPS[family]:
            projects = "WithProjection" in families.config(family, clip.part)["architectures"][0]
            kind = CLIPTextModelWithProjection if projects else CLIPTextModel
            models.append(self._load(kind, self.path / clip.part, dtype=torch.float32))
        return TextEncoder(family, models)

    def _load(self, kind: Any, folder: Path, **options: Any) -> Any:
        """Load a model of class `kind` from a subfolder."""
        config = self._config(folder)
        stated = config.get("_class_name", kind.__name__)
        if stated != kind.__name__:
            raise UserError(f"{folder} has a {stated}, not a {kind.__name__}: {families.SUPPORTED}")
        if config.get("quantization_config"):
            raise UserError(f"{folder} has quantised weights, as its config.json says: use one with plain weights")
        try:
            model, info = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, variant=_variant(folder), **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path} is not a complete diffusers folder: {error}") from error
        except (UnpicklingError, EOFError, KeyError) as error:
            # From torch.load, of a .bin file: diffusers turns it into an OSError, transformers does not. Its own
            # message is left out, because it recommends to load the file in a way that runs the code in it.
            raise UserError(
                f"{self.path} is not a complete diffusers folder: unable to load weights from a .bin file in {folder}, "
                "which is damaged or has more in it than tensors; use .safetensors files"
            ) from error
        except Exception as error:  # of settings of wrong types or values, for which the libraries have no one error
            raise UserError(f"{folder} has a config.json of no model ({type(error).__name__}: {error})") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"{folder} is not complete: {len(missing)} tensors are missing, such as {missing[0]}")
        unused = sorted(info["unexpected_keys"])
        changing = unused if kind is UNet2DConditionModel else attached(unused, set(model.state_dict()))
        if changing:
            raise UserError(f"{folder} has {len(changing)} tensors that no weight is for, such as {changing[0]}")
        if unused:
            log.info("%s: %d tensors are not used, such as %s", folder, len(unused), unused[0])
        return model

    def _scheduler(self) -> dict[str, Any]:
        """Return the scheduler's configuration; raises UserError if its schedule is not Stable Diffusion's."""
        config = self._config("scheduler", "scheduler_config.json")
        name = config.get("_class_name", "")
        full = _defaults(getattr(diffusers, name, None)) | config
        others = [f"{key} is {full[key]!r}" for key, value in _SCHEDULE.items() if full.get(key, value) != value]
        if name.startswith(("EDM", "FlowMatch")) or others:
            what = ", ".join([name or "scheduler_config.json", *others])
            raise UserError(f"{self.path} has another noise schedule than Stable Diffusion's: {what}")
        return config

    def _config(self, part: str | Path, name: str = "config.json") -> dict[str, Any]:
        """Return the configuration of a part, {} if there is none; raises UserError if it is not JSON."""
        path = self.path / part / name
        if not path.is_file():
            return {}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path} is no configuration of a model, but {str(loaded)[:40]!r}: use a complete folder")
        return loaded


def _variant(folder: Path) -> str | None:
    """Return the variant of the weights to load, such as fp16: None for those without one, if there are any."""
    found = {match[1] for file in folder.iterdir() if (match := _WEIGHTS.fullmatch(file.name))}
    if None in found or not found:
        return None
    # Weights without the average are another network than the average, which is what people use.
    return min(found, key=lambda variant: (variant == "non_ema", variant != "fp16", variant))


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the settings of a class of diffusers that a configuration may leave out."""
    parameters = inspect.signature(kind.__init__).parameters.values() if kind else ()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _differences(config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe each setting of a UNet that differs from the expected ones and may change its prediction."""
    defaults = _defaults(UNet2DConditionModel) | {"quantization_config": None}
    ours, theirs = ({**defaults, **each} for each in (expected, config))
    keys = [key for key in ours if not key.startswith("_") and key not in _FREE_UNET_KEYS]
    return [
        f"{key} is {theirs[key]!r} instead of {ours[key]!r}" for key in keys if _plain(ours[key]) != _plain(theirs[key])
    ]


def _plain(value: Any) -> Any:
    """Return the value in one spelling: one entry for a list of equal ones, and None for False."""
    if isinstance(value, list | tuple) and all(entry == value[0] for entry in value):
        return _plain(value[0]) if value else None
    return list(value) if isinstance(value, tuple) else value or None
