"""The smallest files that the host's stock loaders accept, with seeded weights: SD 1.5, SDXL, SD3, Wan, ControlNet.

Each function that writes a file returns its tensors, so that a caller can write more into it.
"""

from functools import partial
from pathlib import Path

import torch
from diffusers import ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor

from trajectory_consistency.trainer.models.unet.ldm import UNET_PREFIX, unet_to_ldm

MINI_SDXL = "mini-sdxl.safetensors"
MINI_SD3 = "mini-sd3.safetensors"
MINI_WAN = "mini-wan.safetensors"

SD3_WIDTH = 64  # one head and one joint block: the host derives the depth as width / 64
SD3_SIDE = 64  # size of the position table in patches of 2 x 2: latents of up to 128 x 128
WAN_WIDTH = 128  # one head: the host derives their number as width / 128


def sd15_unet() -> UNet2DConditionModel:
    """Return the smallest UNet that the host recognizes as SD 1.5: one level, 13.6 M parameters, seeded."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 3  # so that the output has the scale of a real one
    return unet.requires_grad_(False)


def write_sd15_mini(path: Path, unet: UNet2DConditionModel | None = None) -> None:
    """Write sd15_unet(), or the given UNet, as a checkpoint without VAE and text encoder."""
    unet = unet or sd15_unet()
    save_file(unet_to_ldm(unet.state_dict(), unet.config), path)


def sdxl_unet() -> UNet2DConditionModel:
    """Return an SDXL-like UNet of 74 M parameters, with KOALA 700M's depths 0, 2 and 5, which the host recognizes."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        block_out_channels=(320, 320, 320),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 5),
        reverse_transformer_layers_per_block=(1, 1, 1),
        cross_attention_dim=2048,
        attention_head_dim=5,  # despite its name, the number of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 3  # so that the output has the scale of a real one
    return unet.requires_grad_(False)


def write_sdxl_mini(path: Path, unet: UNet2DConditionModel | None = None) -> dict[str, Tensor]:
    """Write sdxl_unet() as an SDXL checkpoint: eps prediction, 4 latent channels, vector conditioning of 2816."""
    unet = unet or sdxl_unet()
    state = unet_to_ldm(unet.state_dict(), unet.config)
    save_file(state, path)
    return state


def _add_layer(state: dict[str, Tensor], generator: torch.Generator, name: str, *shape: int) -> None:
    fan_in = torch.Size(shape[1:]).numel()
    state[f"{name}.weight"] = torch.randn(shape, generator=generator) * fan_in**-0.5
    state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1


def sd3_state() -> dict[str, Tensor]:
    """Return an SD3 network of one joint block, 0.8 M parameters, by name in the file without the prefix."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    layer = partial(_add_layer, state, generator)
    width = SD3_WIDTH
    layer("x_embedder.proj", width, 16, 2, 2)
    layer("context_embedder", width, 4096)
    for name, size in (("t", 256), ("y", 2048)):
        layer(f"{name}_embedder.mlp.0", width, size)
        layer(f"{name}_embedder.mlp.2", width, width)
    block = "joint_blocks.0.x_block"
    layer(f"{block}.attn.qkv", 3 * width, width)
    layer(f"{block}.attn.proj", width, width)
    layer(f"{block}.mlp.fc1", 4 * width, width)
    layer(f"{block}.mlp.fc2", width, 4 * width)
    layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    layer("joint_blocks.0.context_block.attn.qkv", 3 * width, width)
    layer("joint_blocks.0.context_block.adaLN_modulation.1", 2 * width, width)
    layer("final_layer.linear", 2 * 2 * 16, width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    state["pos_embed"] = torch.randn(1, SD3_SIDE**2, width, generator=generator)
    return state


def write_sd3_mini(path: Path) -> dict[str, Tensor]:
    """Write sd3_state() as an SD3 checkpoint: flow with shift 3, 16 latent channels, context width 4096."""
    state = {UNET_PREFIX + name: tensor for name, tensor in sd3_state().items()}
    save_file(state, path)
    return state


def sd3_transformer() -> SD3Transformer2DModel:
    """Return the network of write_sd3_mini in diffusers, converted by diffusers itself."""
    model = SD3Transformer2DModel(
        num_layers=1,
        num_attention_heads=SD3_WIDTH // 64,
        caption_projection_dim=SD3_WIDTH,
        pos_embed_max_size=SD3_SIDE,
    )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(sd3_state()))
    return model.eval().requires_grad_(False)


def wan_state() -> dict[str, Tensor]:
    """Return a Wan text-to-video network of one block, 1.2 M parameters, by name in the file without the prefix."""
    generator = torch.Generator().manual_seed(4)
    state: dict[str, Tensor] = {}
    layer = partial(_add_layer, state, generator)
    width = WAN_WIDTH
    layer("patch_embedding", width, 16, 1, 2, 2)
    for name, size in (("text", 4096), ("time", 256)):
        layer(f"{name}_embedding.0", width, size)
        layer(f"{name}_embedding.2", width, width)
    layer("time_projection.1", 6 * width, width)
    for attention in ("blocks.0.self_attn", "blocks.0.cross_attn"):
        for part in ("q", "k", "v", "o"):
            layer(f"{attention}.{part}", width, width)
        for part in ("q", "k"):
            state[f"{attention}.norm_{part}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    state["blocks.0.norm3.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    state["blocks.0.norm3.bias"] = 0.1 * torch.randn(width, generator=generator)
    layer("blocks.0.ffn.0", 2 * width, width)
    layer("blocks.0.ffn.2", width, 2 * width)
    layer("head.head", 2 * 2 * 16, width)
    for name, parts in (("blocks.0", 6), ("head", 2)):
        state[f"{name}.modulation"] = torch.randn(1, parts, width, generator=generator) * width**-0.5
    return state


def write_wan_mini(path: Path) -> dict[str, Tensor]:
    """Write wan_state() as a Wan 2.1 checkpoint: flow with shift 8, 16 latent channels, several frames."""
    state = {UNET_PREFIX + name: tensor for name, tensor in wan_state().items()}
    save_file(state, path)
    return state


def wan_transformer() -> WanTransformer3DModel:
    """Return the network of write_wan_mini in diffusers, converted by diffusers itself."""
    model = WanTransformer3DModel(num_attention_heads=1, num_layers=1, ffn_dim=2 * WAN_WIDTH)
    model.load_state_dict(convert_wan_transformer_to_diffusers(wan_state()))
    return model.eval().requires_grad_(False)


def mini_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet for the mini SD 1.5 UNet, with nonzero output, unlike a freshly initialized one."""
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(unet).eval()
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.05)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.05)
    return controlnet.requires_grad_(False)


def write_controlnet_mini(
    path: Path, unet: UNet2DConditionModel, controlnet: ControlNetModel | None = None
) -> dict[str, Tensor]:
    """Write mini_controlnet(unet), or the given ControlNet, under the names of the original files."""
    controlnet = controlnet or mini_controlnet(unet)
    conditioning = controlnet.controlnet_cond_embedding
    hint = [
        conditioning.conv_in,
        *conditioning.blocks,
        conditioning.conv_out,
    ]  # activations lie between
    parts = {f"input_hint_block.{2 * i}": module for i, module in enumerate(hint)}
    parts |= {f"zero_convs.{i}.0": module for i, module in enumerate(controlnet.controlnet_down_blocks)}
    parts["middle_block_out.0"] = controlnet.controlnet_mid_block
    trunk = {name: tensor for name, tensor in controlnet.state_dict().items() if not name.startswith("controlnet_")}
    state = {name.removeprefix(UNET_PREFIX): tensor for name, tensor in unet_to_ldm(trunk, unet.config).items()}
    state |= {f"{name}.{end}": getattr(module, end) for name, module in parts.items() for end in ("weight", "bias")}
    state = {f"control_model.{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(state, path)
    return state
