"""Load the model to distill: from one checkpoint file as ComfyUI has it, from a diffusers folder, or the embedded one.

Flows in: a path.  Flows out: a frozen `Base`, or a `UserError` that says what the file is instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel

from tcd import Prediction, scaled_linear_alpha_bar
from trainer import bases, ldm, tiny
from trainer.errors import UserError

_CONV_IN = ldm.UNET_PREFIX + "input_blocks.0.0.weight"
_CONTEXT = "attn2.to_k.weight"
# What tells the families apart: (channels of the first convolution, width of the text embedding).
_FAMILIES: dict[tuple[int, int], bases.Family] = {(320, 768): "sd15", (32, 32): "tiny"}
_OTHER_CONTEXTS = {1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner"}


@dataclass(frozen=True)
class Base:
    """A model to distill: three frozen networks, the schedule they were trained on, and what the UNet predicts."""

    name: str
    family: bases.Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    alpha_bar: Tensor
    """[1000] float64, by integer training timestep."""
    prediction: Prediction


def load_base(path: str, *, prediction: str = "auto", dtype: torch.dtype = torch.float32) -> Base:
    """Load `path` (a .safetensors file, a diffusers folder, or the word `tiny`) with weights in `dtype`.

    Raises UserError when nothing is there, the file is damaged, or it is not an SD1.5 model.
    """
    source = locate(path)
    base = _from_folder(source) if source.is_dir() else _from_file(source)
    for model in (base.unet, base.vae, base.text_encoder):
        model.requires_grad_(False).eval()
    if dtype != torch.float32:
        base.unet.to(dtype)
        base.text_encoder.to(dtype)  # the VAE stays in float32: SD1.5's overflows in float16, and it runs once
    if prediction == "auto":
        return base
    return Base(**{**vars(base), "prediction": prediction})


def locate(path: str) -> Path:
    """The file or folder that a configuration's base path means.

    Raises UserError when nothing is there.
    """
    source = tiny.CHECKPOINT if path == "tiny" else Path(path).expanduser()
    if not source.exists():
        raise UserError(f"there is no model at {source}: give a .safetensors checkpoint, a diffusers folder, or tiny")
    return source


def identify(path: str) -> bases.Family:
    """Tell which family the model at `path` belongs to, without reading its weights.

    Raises UserError as `load_base` does.
    """
    source = locate(path)
    return _family_of_folder(source) if source.is_dir() else _family_of(source, _read_shapes(source))


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _open(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a .safetensors file.

    Raises UserError when it is not a whole safetensors file.
    """
    with _open(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated, or of another format, "
            "such as .ckpt; download it again or convert it"
        ) from error


def _from_file(path: Path) -> Base:
    """Read a single-file checkpoint: UNet, VAE and text encoder under the original latent-diffusion names."""
    family = _family_of(path, _read_shapes(path))
    state = read_safetensors(path)
    config = str(bases.ROOT / family)
    parts: list[Any] = []
    for model, subfolder, prefix in (
        (UNet2DConditionModel, "unet", ldm.UNET_PREFIX),
        (AutoencoderKL, "vae", ldm.VAE_PREFIX),
    ):
        own = {key: value.float() for key, value in state.items() if key.startswith(prefix)}
        try:
            parts.append(model.from_single_file(own, config=config, subfolder=subfolder, local_files_only=True))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{path} does not hold a whole {family} {subfolder}: {error}") from error
    text_encoder = bases.empty_text_encoder(family)
    _load_text_encoder(text_encoder, state, path)
    prediction: Prediction = "v" if "v_pred" in state else "eps"
    return Base(path.stem, family, parts[0], parts[1], text_encoder, scaled_linear_alpha_bar(), prediction)


def _family_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bases.Family:
    """Tell which family a checkpoint belongs to by the shapes of its UNet."""
    contexts = [shape[1] for key, shape in shapes.items() if key.startswith(ldm.UNET_PREFIX) and key.endswith(_CONTEXT)]
    if _CONV_IN not in shapes or not contexts:
        examples = ", ".join(sorted(shapes)[:3])
        raise UserError(
            f"{path} is not an SD1.5 checkpoint: it has no UNet under {ldm.UNET_PREFIX!r} (its tensors: {examples} ...)"
        )
    found = shapes[_CONV_IN][0], contexts[0]
    if found not in _FAMILIES:
        guess = _OTHER_CONTEXTS.get(found[1], "of an unknown architecture")
        raise UserError(
            f"{path} is {guess} ({found[0]} channels, text width {found[1]}): "
            "SD1.5 checkpoints (320 channels, text width 768) can be distilled"
        )
    missing = [
        prefix for prefix in (ldm.VAE_PREFIX, ldm.TEXT_PREFIX[:17]) if not any(k.startswith(prefix) for k in shapes)
    ]
    if missing:
        raise UserError(f"{path} has no tensors under {missing}: use a full checkpoint with VAE and text encoder")
    return _FAMILIES[found]


def _load_text_encoder(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill a CLIPTextModel from a checkpoint; its names, and the model's, may or may not begin with `text_model.`."""
    own = {}
    for key, value in state.items():
        if key.startswith("cond_stage_model.transformer.") and not key.endswith("position_ids"):
            own[key.removeprefix("cond_stage_model.transformer.").removeprefix("text_model.")] = value.float()
    own.pop("text_projection.weight", None)  # some fine-tunes carry it along; SD1.5 does not use it
    if all(key.startswith("text_model.") for key in model.state_dict()):
        own = {f"text_model.{key}": value for key, value in own.items()}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold a whole CLIP-L text encoder: {error}") from error


def _from_folder(folder: Path) -> Base:
    """Read a diffusers folder (`unet/`, `vae/`, `text_encoder/`, `scheduler/`)."""
    family = _family_of_folder(folder)
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole diffusers folder: {error}") from error
    return Base(folder.name, family, unet, vae, text_encoder, scaled_linear_alpha_bar(), _folder_prediction(folder))


def _family_of_folder(folder: Path) -> bases.Family:
    """Tell which family a diffusers folder belongs to by its UNet's configuration."""
    index = folder / "unet" / "config.json"
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers folder: there is no unet/config.json in it")
    config = json.loads(index.read_text(encoding="utf-8"))
    found = config["block_out_channels"][0], config["cross_attention_dim"]
    if found not in _FAMILIES:
        raise UserError(f"{folder} has a UNet of {found[0]} channels and text width {found[1]}: SD1.5 has 320 and 768")
    return _FAMILIES[found]


def _folder_prediction(folder: Path) -> Prediction:
    """What the UNet of a diffusers folder predicts, according to its scheduler."""
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"{folder} has a zero-terminal-SNR schedule, which this trainer does not support yet")
    known: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    return known[scheduler.get("prediction_type", "epsilon")]
