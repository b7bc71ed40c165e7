"""The model to distill: from one checkpoint file as ComfyUI has it, from a diffusers folder, or the embedded one.

Flows in: a path, and what its owner knows of it.  Flows out: a frozen `Base` and its `Encoders`, or a `UserError` that
says what the file is instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ....tcd import Prediction, scaled_linear_alpha_bar, zero_terminal_snr
from ... import tiny
from ...errors import UserError
from ..conditioning import Conditioning
from .families import Family
from .folder import Folder
from .single_file import SingleFile
from .text import TextEncoder


class Identity(NamedTuple):
    """What a model is, as far as it says itself or its owner does."""

    family: Family
    prediction: Prediction
    zero_snr: bool
    """Whether its schedule ends without any signal."""
    notes: tuple[str, ...]
    """What of this was assumed, and how to set it."""

    def __str__(self) -> str:
        return f"{self.family}, predicts {self.prediction}{', zero terminal SNR' if self.zero_snr else ''}"


@dataclass(frozen=True)
class Base:
    """A model to distill: a frozen UNet, the schedule it was trained on, and what it predicts."""

    name: str
    family: Family
    unet: UNet2DConditionModel
    alpha_bar: Tensor
    """[1000] float64, by integer training timestep; with zero terminal SNR the last is 0."""
    prediction: Prediction


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into what the UNet works on: frozen, and not needed while it trains."""

    vae: AutoencoderKL
    text_encoder: TextEncoder

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """What the UNet is to be told of `captions`, a row each and without time_ids, on the text encoder's device."""
        return self.text_encoder.encode(captions)

    def to(self, device: torch.device) -> Encoders:
        """The same, moved to a device."""
        self.vae.to(device)
        self.text_encoder.to(device)
        return self


def identify(path: str, *, prediction: str = "auto", zero_snr: str = "auto", vae: str = "") -> Identity:
    """Tell what the model at `path` is, without reading its weights; `prediction` and `zero_snr` are its owner's word.

    Raises UserError when nothing is there, the file is damaged, it is of no family that can be distilled, it lacks a
    text encoder or, if `vae` names no other, a VAE, or it is to predict eps at zero terminal SNR.
    """
    source = _open(path)
    identity = _identify(source, prediction, zero_snr)
    source.check_encoders(vae=not (vae and _open(vae)))
    return identity


def load_base(
    path: str, *, prediction: str = "auto", zero_snr: str = "auto", dtype: torch.dtype = torch.float32
) -> Base:
    """Load the UNet of `path` (a .safetensors file, a diffusers folder, or the word `tiny`) with weights in `dtype`.

    Raises UserError as `identify` does, and when it is not whole.
    """
    source = _open(path)
    identity = _identify(source, prediction, zero_snr)
    alpha_bar = scaled_linear_alpha_bar()
    return Base(
        source.path.stem if source.path.is_file() else source.path.name,
        identity.family,
        source.unet(dtype).requires_grad_(False).eval(),
        zero_terminal_snr(alpha_bar) if identity.zero_snr else alpha_bar,
        identity.prediction,
    )


def load_encoders(path: str, *, vae: str = "", dtype: torch.dtype = torch.float32) -> Encoders:
    """Load the text encoders of what `load_base` loads, in `dtype`, and its VAE, or that of `vae`, in float32.

    Raises UserError as `load_base` does.
    """
    return Encoders(load_vae(path, vae=vae), load_text_encoder(path, dtype=dtype))


def load_text_encoder(path: str, *, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """Load the text encoders that `load_encoders` loads, alone.

    Raises UserError as `load_base` does.
    """
    return _open(path).text_encoder(dtype).requires_grad_(False).eval()


def load_vae(path: str, *, vae: str = "") -> AutoencoderKL:
    """Load the VAE that `load_encoders` loads, alone.

    Raises UserError as `load_base` does.
    """
    source = _open(path)
    return (_open(vae) if vae else source).vae(source.family()).requires_grad_(False).eval()


def locate(path: str) -> Path:
    """The file or folder that a configuration's base path means.

    Raises UserError when nothing is there.
    """
    source = tiny.CHECKPOINT if path == "tiny" else Path(path).expanduser()
    if not source.exists():
        raise UserError(f"there is no model at {source}: give a .safetensors checkpoint, a diffusers folder, or tiny")
    return source


def _open(path: str) -> SingleFile | Folder:
    source = locate(path)
    return Folder(source) if source.is_dir() else SingleFile(source)


def _identify(source: SingleFile | Folder, prediction: str, zero_snr: str) -> Identity:
    """Settle what the model is: its owner's word, else its own, else what such models mostly are."""
    family = source.family()
    notes = []
    known: dict[str, Prediction] = {"eps": "eps", "v": "v"}
    said, how = source.prediction()
    predicts = known.get(prediction, said)
    if predicts is None:
        predicts = "eps"
        other = "set base.prediction to v if it is a v-prediction model"
        notes.append(f"{source.path.name} does not say what its UNet predicts: eps is assumed; {other}")
    elif prediction == "auto" and "ComfyUI" in how:
        notes.append(f"{predicts} is what the UNet predicts according to {how}; set base.prediction if it is not so")
    zero = {"yes": True, "no": False}.get(zero_snr, source.zero_snr())
    if zero is None and predicts != "eps":
        other = "set base.zero_snr to yes if it is a zero terminal SNR model"
        notes.append(f"{source.path.name} does not speak of zero terminal SNR: none is assumed; {other}")
    if zero and predicts == "eps":
        raise UserError(
            f"{source.path} is to predict eps at zero terminal SNR, where x at timestep 999 is noise alone, and eps "
            'says nothing of the picture: such a model predicts v (set base.prediction = "v"), or is none '
            '(set base.zero_snr = "no")'
        )
    return Identity(family, predicts, bool(zero), tuple(notes))
