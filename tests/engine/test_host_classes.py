"""Every kind of model that the host supports, without weights: it can be trained, or is refused with the reason.

The models that cannot be trained are listed in docs/models.md, and this test compares.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from families import FAMILIES
from time_layers import CHROMA, DIT
from torch import nn

from trajectory_consistency.nodes.host.training.recompute import blocks
from trajectory_consistency.tcd import BridgeSchedule
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.comfy.checkpoint import check_trainable
from trajectory_consistency.trainer.models.comfy.model import HostModel
from trajectory_consistency.trainer.models.seam import LatentFormat

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
META = torch.device("meta")
COMPUTING = {"PixArtAlpha", "PixArtSigma"}
NEED_WEIGHTS = {
    "ACEStep15",
    "ChromaRadiance",
    "GenmoMochi",
    "RT_DETR_v4",
    "SD_X4Upscaler",
    "SV3D_p",
    "SV3D_u",
    "SVD_img2vid",
    "SeedVR2",
    "StableAudio",
    "StableAudio3",
    "Stable_Zero123",
    "Trellis2",
}
"""Classes whose networks can be built only from the sizes in a file."""


def arguments_of(cls: Any, family: str) -> dict[str, Any]:
    """Return the arguments with which a family's stand-in builds its network."""
    found: dict[str, Any] = {}

    def keep(self: nn.Module, **settings: Any) -> None:
        nn.Module.__init__(self)
        found.update(settings)

    with mock.patch.object(cls, "__init__", keep):
        FAMILIES[family].build()
    return found


HIDREAM = {
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "out_channels": 16,
    "llama_layers": [0, 1],
    "num_attention_heads": 2,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
# Networks without defaults: a class is built with the first of these that it takes.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    arguments_of(comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel, "sd15"),
    arguments_of(comfy.ldm.flux.model.Flux, "flux"),
    arguments_of(comfy.ldm.flux.model.Flux, "flux2"),
    arguments_of(comfy.ldm.hunyuan_video.model.HunyuanVideo, "hunyuan-video"),
    # The host's class has the width of the whole model.
    {
        **arguments_of(comfy.ldm.lumina.model.NextDiT, "z-image"),
        "n_heads": 30,
        "n_kv_heads": 30,
        "axes_dims": [32, 48, 48],
    },
    DIT,
    CHROMA,
    HIDREAM,
]


def build(kind: Any) -> Any:
    """Return the settings and the model of a class of the host, or None if that needs its weights."""
    for extra in SETTINGS:
        try:
            config = kind({**extra, **kind.unet_config, "dtype": torch.float32})
            # Networks that compute with numbers when they are built take only their layers from the meta device.
            with nullcontext() if kind.__name__ in COMPUTING else META:
                model = config.get_model({}, "", device=META)
        except (AssertionError, KeyError, TypeError, RuntimeError):
            continue
        model.model_sampling = comfy.model_base.model_sampling(config, model.model_type)  # with its numbers
        return config, model
    return None


def reason(config: Any, model: Any) -> str | None:
    """Return why a model is refused; None if it has all that training needs."""
    try:
        time_layer = check_trainable(config, model, Path("model.safetensors"))
    except UserError as error:
        return str(error).rpartition("trained: ")[2]
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=META, offload_device=META)
    trained = HostModel(patcher, time_layer, LatentFormat(config.latent_format.latent_channels, 8))
    schedule = trained.schedule
    assert not isinstance(schedule, BridgeSchedule) and schedule.sigmas_for(4).isfinite().all()
    assert blocks(trained.network), "its activations can be recomputed"
    weights = trained.new_weights(rank=2, alpha=2.0, seed=0, target_input="s")
    assert weights.target_time is not None and weights.paths
    return None


@pytest.mark.slow
def test_every_model_of_the_host_can_be_trained_or_is_refused_and_in_the_docs() -> None:
    built = {kind.__name__: build(kind) for kind in comfy.supported_models.models}
    assert {name for name, made in built.items() if made is None} <= NEED_WEIGHTS
    reasons = {name: reason(*made) for name, made in built.items() if made is not None}
    assert len(reasons) > 60
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name: why for name, why in reasons.items() if why} == {
        name: why for name, why in listed.items() if name in built
    }
