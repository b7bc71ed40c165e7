"""The names of a single-file checkpoint: diffusers module path -> the original latent-diffusion key.

The reading direction (file -> diffusers) is diffusers' own converter; this is the writing direction, for files
that ComfyUI loads.  Flows in: state dicts in diffusers' names.  Flows out: one dict in the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def unet_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a UNet2DConditionModel's state dict; `config` is the model's own."""
    modules = _unet_modules(config)
    return {UNET_PREFIX + _rename(key, modules, _UNET_RESNET, ".resnets."): value for key, value in state.items()}


def vae_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an AutoencoderKL's state dict; attention weights become the 1 x 1 convolutions of the original."""
    modules = _vae_modules(config)
    out = {}
    for key, value in state.items():
        inner = _VAE_ATTENTION if ".attentions." in key else {"conv_shortcut": "nin_shortcut"}
        name = VAE_PREFIX + _rename(key, modules, inner, ".")
        is_projection = ".attentions." in key and value.ndim == 2
        out[name] = value[:, :, None, None] if is_projection else value
    return out


def text_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's state dict, whether or not its names begin with `text_model.`."""
    return {TEXT_PREFIX + key.removeprefix("text_model."): value for key, value in state.items()}


def _rename(key: str, modules: Mapping[str, str], inner: Mapping[str, str], inner_within: str) -> str:
    """Rename the longest known module prefix of `key`, and what is inside it where `inner_within` is in the path."""
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        prefix = ".".join(parts[:cut])
        if prefix in modules:
            rest = ".".join(parts[cut:])
            if inner_within in key:
                stem, _, leaf = rest.rpartition(".")
                rest = f"{inner.get(stem, stem)}.{leaf}" if stem else leaf
            return f"{modules[prefix]}.{rest}"
    raise KeyError(f"no single-file name for {key!r}")


def _unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """UNet modules by diffusers path; the blocks of the original are one numbered row down and one up."""
    layers: int = config["layers_per_block"]
    down: Sequence[str] = config["down_block_types"]
    names = dict(_UNET_TOP)
    row = 1
    for i in range(len(down)):
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{row}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{row}.1"
            row += 1
        if i < len(down) - 1:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{row}.0.op"
            row += 1
    row = 0
    for i, kind in enumerate(config["up_block_types"]):
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{row}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{row}.1"
            row += 1
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{row - 1}.{2 if 'CrossAttn' in kind else 1}.conv"
    return names


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """VAE modules by diffusers path; the original numbers its decoder levels from the picture inwards."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        names[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        names |= {f"{half}.mid_block.resnets.{j}": f"{half}.mid.block_{j + 1}" for j in (0, 1)}
    for i in range(levels):
        outward = levels - 1 - i
        names |= {f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for j in range(layers)}
        names |= {f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{outward}.block.{j}" for j in range(layers + 1)}
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{outward}.upsample.conv"
    return names
