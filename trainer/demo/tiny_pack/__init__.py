"""A ComfyUI pack, installed by the demo and by tests, that adds support for the tiny family.

With it, the stock CheckpointLoaderSimple loads the UNet and the text encoder of a tiny checkpoint. The node
TinyShapesVAE loads the VAE, because the stock loader always builds a VAE with 128 channels. The sizes are those in
trainer/models/unet/families/tiny. Each GroupNorm of the tiny models has 4 groups, but the host always builds 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget

NORM_GROUPS = 4
TEXT_CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 16,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@contextmanager
def patched_group_norm() -> Iterator[None]:
    """Within the block, every new GroupNorm has NORM_GROUPS groups, and ignores the number in its arguments."""
    build = torch.nn.GroupNorm.__init__

    def build_with_norm_groups(
        self: torch.nn.GroupNorm, num_groups: int, num_channels: int, *args: Any, **options: Any
    ) -> None:
        build(self, NORM_GROUPS, num_channels, *args, **options)

    with mock.patch.object(torch.nn.GroupNorm, "__init__", build_with_norm_groups):
        yield


class TinyTextEncoder(comfy.sd1_clip.SDClipModel):
    """SD1.5's text encoder with a width of 32 and two layers."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        """Take the arguments that the host passes to every text encoder."""
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=TEXT_CONFIG,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    """The host's wrapper around TinyTextEncoder."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        """Take the arguments that the host passes to every text encoder."""
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=TinyTextEncoder)


class TinyShapes(comfy.supported_models.SD15):
    """The host's model class for a tiny checkpoint: SD1.5 with a width of 32."""

    unet_config = comfy.supported_models.SD15.unet_config | {"context_dim": 32, "model_channels": 32}
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}
    vae_key_prefix = ["no such key, so that the host does not try its own VAE on it: "]

    def get_model(self, *args: Any, **options: Any) -> Any:
        """Build the model, with the UNet in it."""
        with patched_group_norm():
            return super().get_model(*args, **options)

    def clip_target(self, state_dict: Mapping[str, Any] | None = None) -> ClipTarget:
        """Return the classes of the tokenizer and the text encoder."""
        return ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinyClip)


class TinyShapesVAE:
    """Node that loads the VAE of a tiny checkpoint."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, as the host calls it
        """Return the node's inputs: the file name of a checkpoint."""
        return {"required": {"ckpt_name": (folder_paths.get_filename_list("checkpoints"),)}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "loaders"

    def load(self, ckpt_name: str) -> tuple[comfy.sd.VAE]:
        """Load the VAE of a checkpoint."""
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("checkpoints", ckpt_name))
        weights = comfy.utils.state_dict_prefix_replace(tensors, {"first_stage_model.": ""}, filter_keys=True)
        with patched_group_norm():
            return (comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": VAE_CONFIG, "embed_dim": 4}}),)


if not any(model.__name__ == TinyShapes.__name__ for model in comfy.supported_models.models):
    comfy.supported_models.models.insert(0, TinyShapes)

NODE_CLASS_MAPPINGS = {"TinyShapesVAE": TinyShapesVAE}
