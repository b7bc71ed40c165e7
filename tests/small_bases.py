"""The families of full-size models in small: their layout, block for block, at a fraction of the width."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.families import Family, UNetSignature
from trajectory_consistency.trainer.models.unet.prompt import clip_tokenizer
from trajectory_consistency.trainer.models.unet.text import CLIPS, TextEncoder

UNET = {
    "sd15": {"block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 8, "attention_head_dim": 2},
    "sd2": {"block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 16, "attention_head_dim": [1, 2, 2, 2]},
    "sdxl": {
        "block_out_channels": [16, 32, 32],
        "cross_attention_dim": 24,
        "attention_head_dim": [1, 2, 2],
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    },
}
SHARED = {"norm_num_groups": 8, "sample_size": 8}
VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
SMALL = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LARGE = {**SMALL, "hidden_size": 16, "intermediate_size": 64, "projection_dim": 16}
TEXT = {
    "sd15": {"text_encoder": SMALL},
    "sd2": {"text_encoder": LARGE},
    "sdxl": {"text_encoder": SMALL, "text_encoder_2": LARGE},
}
SIGNATURES: dict[UNetSignature, Family] = {
    UNetSignature(4, 16, 8, 0): "sd15",
    UNetSignature(4, 16, 16, 0): "sd2",
    UNetSignature(4, 16, 24, 40): "sdxl",
}


def shrink(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the families be the small ones from now on."""
    clip_tokenizer()  # reads its file from where the real ones are
    for family in SIGNATURES.values():
        parts = {"unet": UNET[family] | SHARED, "vae": VAE, **TEXT[family]}
        for part, changes in parts.items():
            (folder / family / part).mkdir(parents=True)
            text = json.dumps(bases.config(family, part) | changes)
            (folder / family / part / "config.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bases, "_FAMILIES", SIGNATURES)
    _read_from(folder, monkeypatch)


def use_unet(monkeypatch: pytest.MonkeyPatch, family: Family, unet: UNet2DConditionModel, folder: Path) -> None:
    """Let the UNet of a family be built like this one from now on; folder: a new one for the settings of all."""
    clip_tokenizer()  # reads its file from where the real ones are
    settings = {**unet.config, "sample_size": bases.config(family, "unet")["sample_size"]}
    shutil.copytree(bases.ROOT, folder)
    (folder / family / "unet" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    _read_from(folder, monkeypatch)


def _read_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "ROOT", folder)
    for name in ("layer_shapes", "tensor_shapes"):  # without what they have seen
        monkeypatch.setattr(bases, name, cache(getattr(bases, name).__wrapped__))


class Parts(NamedTuple):
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: TextEncoder


@cache
def random_parts(family: Family) -> Parts:
    """The models of a shrunken family with weights of seed 0, also where they begin as zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = [bases.empty_text_encoder(family, clip.part) for clip in CLIPS[family]]
        parts = Parts(bases.empty_unet(family), bases.empty_vae(family), TextEncoder(family, text))
        for model in parts:
            for parameter in model.eval().requires_grad_(False).parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return parts


def to_state(parts: Parts) -> dict[str, Tensor]:
    """The models in the names of a single-file checkpoint."""
    state = ldm.unet_to_ldm(parts.unet.state_dict(), parts.unet.config)
    state |= ldm.vae_to_ldm(parts.vae.state_dict(), parts.vae.config)
    for clip, model in zip(parts.text_encoder.clips, parts.text_encoder, strict=True):
        tensors = model.state_dict()
        state |= ldm.to_ldm(tensors, clip.locations(tensors, clip.prefixes[0]))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write(path: Path, state: dict[str, Tensor], **options: Any) -> Path:
    save_file(state, path, **options)
    return path


def save_folder(parts: Parts, folder: Path, scheduler: dict[str, Any] | None = None) -> Path:
    """Write the models as diffusers does."""
    parts.unet.save_pretrained(folder / "unet")
    parts.vae.save_pretrained(folder / "vae")
    for clip, model in zip(parts.text_encoder.clips, parts.text_encoder, strict=True):
        model.save_pretrained(folder / clip.part)
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return folder
