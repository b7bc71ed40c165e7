"""Where the tensors of diffusers and transformers models are in a single-file checkpoint with latent-diffusion names.

The same `TensorLocation` of each tensor is used to read and to write files.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
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
# In files that diffusers wrote before its version 0.14.
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV_INDEX = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


class TensorLocation(NamedTuple):
    """The name and the layout of a model's tensor in a single-file checkpoint."""

    name: str
    """Key in the file."""
    qkv_index: int | None = None
    """0, 1 or 2 if the file stores query, key and value in one tensor, as OpenCLIP does; None otherwise."""
    transposed: bool = False
    """Whether the file stores the transposed matrix, as OpenCLIP does for its text projection."""
    convolution: bool = False
    """Whether the file stores matrices as 1 x 1 convolutions, as it does in the VAE's attention."""

    def read(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Extract the model's tensor, of the given shape, from the file's tensor.

        Raises ValueError if the result has a different shape.
        """
        part = tensor if self.qkv_index is None else tensor.chunk(3)[self.qkv_index]
        part = part.T if self.transposed else part
        part = rearrange(part, "o ... -> o (...)") if self.convolution and part.ndim > 1 else part
        if part.shape != torch.Size(shape):
            raise ValueError(f"{self.name} has the shape {list(tensor.shape)}, which gives no {list(shape)}")
        return part


def to_ldm(state: Mapping[str, Tensor], locations: Mapping[str, TensorLocation]) -> dict[str, Tensor]:
    """Convert a model's state dict to the names and layouts of the file."""
    out: dict[str, Tensor] = {}
    qkv: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        location = locations[key]
        if location.qkv_index is not None:
            qkv.setdefault(location.name, {})[location.qkv_index] = value
        elif location.convolution and value.ndim == 2:
            out[location.name] = rearrange(value, "o i -> o i 1 1")
        else:
            out[location.name] = value.T if location.transposed else value
    return out | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in qkv.items()}


def unet_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a UNet2DConditionModel's state dict; config: the model's configuration."""
    return to_ldm(state, unet_locations(state, config))


def vae_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert an AutoencoderKL's state dict; attention weights become 1 x 1 convolutions, as in the original."""
    return to_ldm(state, vae_locations(state, config))


def text_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of SD1.5's CLIPTextModel; its names may begin with `text_model.` or not."""
    return to_ldm(state, clip_locations(state, TEXT_PREFIX))


def unet_locations(keys: Iterable[str], config: Mapping[str, Any]) -> dict[str, TensorLocation]:
    """Return the locations of a UNet2DConditionModel's tensors; config: the model's configuration."""
    modules = _unet_modules(config)
    return {key: TensorLocation(UNET_PREFIX + _rename(key, modules, _UNET_RESNET, ".resnets.")) for key in keys}


def vae_locations(
    keys: Iterable[str], config: Mapping[str, Any], prefix: str = VAE_PREFIX
) -> dict[str, TensorLocation]:
    """Return the locations of an AutoencoderKL's tensors; prefix: "" for a file that contains only a VAE."""
    modules = _vae_modules(config)
    out = {}
    for key in keys:
        attends = ".attentions." in key
        inner = _VAE_ATTENTION if attends else {"conv_shortcut": "nin_shortcut"}
        out[key] = TensorLocation(prefix + _rename(key, modules, inner, "."), convolution=attends)
    return out


def diffusers_vae_locations(keys: Iterable[str], stored: Container[str], prefix: str = "") -> dict[str, TensorLocation]:
    """Return the locations of an AutoencoderKL's tensors in a file of diffusers; stored: the names in the file."""
    out = {}
    for key in keys:
        stem, _, leaf = key.rpartition(".")
        module, _, projection = stem.partition(".attentions.0.")
        old = f"{prefix}{module}.attentions.0.{_OLD_VAE_ATTENTION.get(projection)}.{leaf}"
        out[key] = TensorLocation(old if old in stored else prefix + key)
    return out


def clip_locations(keys: Iterable[str], prefix: str) -> dict[str, TensorLocation]:
    """Return the locations of a CLIPTextModel's tensors in a file with transformers' names (CLIP-L of SD1.5, SDXL)."""
    return {key: TensorLocation(prefix + key.removeprefix("text_model.")) for key in keys}


def open_clip_locations(keys: Iterable[str], prefix: str) -> dict[str, TensorLocation]:
    """Return the locations of a CLIPTextModel's tensors in a file with OpenCLIP's names (SD2.x, SDXL's second encoder).

    Raises KeyError if OpenCLIP has no such tensor.
    """
    out = {}
    for key in keys:
        name = key.removeprefix("text_model.")
        if name in _OPEN_CLIP:
            out[key] = TensorLocation(prefix + _OPEN_CLIP[name], transposed=name == "text_projection.weight")
            continue
        _, _, number, rest = name.split(".", 3)  # encoder.layers.N.
        module, _, leaf = rest.rpartition(".")
        block = f"{prefix}transformer.resblocks.{number}."
        if module in _QKV_INDEX:
            out[key] = TensorLocation(f"{block}attn.in_proj_{leaf}", qkv_index=_QKV_INDEX[module])
        else:
            out[key] = TensorLocation(f"{block}{_OPEN_CLIP_LAYER[module]}.{leaf}")
    return out


def _rename(key: str, modules: Mapping[str, str], inner: Mapping[str, str], inner_within: str) -> str:
    """Replace the longest prefix of `key` that is in `modules`; rename the rest by `inner` if key has `inner_within`.

    Raises KeyError if no prefix is in `modules`.
    """
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
    """Map diffusers module paths of a UNet to original ones, where all down blocks, and all up blocks, are one list."""
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
    """Map diffusers module paths of a VAE to original ones, which number decoder levels from the pixels inwards."""
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
