"""The spellings in which people's LoRA files name the same tensors, and the modules of the real networks."""

from collections.abc import Callable, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

Spelling = Callable[[str, str], str]
"""The name of a tensor, given the module's diffusers path and the side, "down" or "up"."""

PEFT_SIDE = {"down": "A", "up": "B"}


def _kohya(prefix: str) -> Spelling:
    return lambda path, side: f"{prefix}{path.replace('.', '_')}.lora_{side}.weight"


def _peft(prefix: str, ending: str = ".weight") -> Spelling:
    return lambda path, side: f"{prefix}{path}.lora_{PEFT_SIDE[side]}{ending}"


def _processor(path: str, side: str, ending: str) -> str:
    """Return the spelling of diffusers < 0.20, whose attention layers were of the processors, the rest as ever."""
    stem, _, layer = path.removesuffix(".0").rpartition(".")
    if not layer.startswith("to_"):
        return f"unet.{path}.lora.{side}.weight"
    return f"unet.{stem}.processor.{layer}{ending}"


SPELLINGS: dict[str, Spelling] = {
    "kohya": _kohya("lora_unet_"),
    "LyCORIS": _kohya("lycoris_"),
    "OneTrainer": _kohya("lora_transformer_"),
    "PEFT": _peft(""),
    "PEFT default": _peft("", ".default.weight"),
    "PEFT another adapter": _peft("", ".default_0.weight"),
    "PEFT tcd": _peft("base_model.model.", ".tcd"),
    "PEFT module": _peft("module.base_model.model."),
    "PEFT without weight": _peft("", ""),
    "PEFT unet": _peft("unet."),
    "PEFT base_model": _peft("base_model.model."),
    "PEFT unet.base_model": _peft("unet.base_model.model.", ".default.weight"),
    "PEFT transformer": _peft("transformer."),
    "diffusers": lambda path, side: f"unet.{path}.lora.{side}.weight",
    "diffusers linear layer": lambda path, side: f"unet.{path}.lora_linear_layer.{side}.weight",
    "diffusers processor": lambda path, side: _processor(path, side, f"_lora.{side}.weight"),
    "diffusers processor, PEFT": lambda path, side: _processor(path, side, f".lora_{PEFT_SIDE[side]}.weight"),
    "native prefix": _peft("diffusion_model."),
    "checkpoint prefix": _peft("model.diffusion_model."),
}


def spelled(halves: Mapping[tuple[str, str], Tensor], spelling: Spelling) -> dict[str, Tensor]:
    """Return a LoRA's tensors, given by (diffusers path, side), in a spelling."""
    return {spelling(path, side): tensor for (path, side), tensor in halves.items()}


def sd15_unet() -> UNet2DConditionModel:
    """The UNet of SD 1.5, without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl_unet() -> UNet2DConditionModel:
    """The UNet of SDXL, without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def halves_on(modules: Mapping[str, nn.Module], rank: int = 4) -> dict[tuple[str, str], Tensor]:
    """Return the halves of a LoRA on modules by diffusers path, random, on the device of the modules."""
    halves = {}
    for path, module in modules.items():
        out, into, *kernel = module.weight.shape
        halves[path, "down"] = torch.randn(rank, into, *kernel, device=module.weight.device)
        halves[path, "up"] = torch.randn(out, rank, *[1] * len(kernel), device=module.weight.device)
    return halves
