"""LoRAs of random weights for the mini UNet, in kohya's names, and what they come to when merged by hand."""

import copy
import math
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)
RANK, ALPHA = 4, 2.0
MODULES = 65  # of the mini UNet that are such targets


def random_lora(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA in kohya's names on every target of the UNet, big enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for path, module in targets(unet).items():
        out, into, *kernel = module.weight.shape
        scale = 1.0 / math.prod([into, *kernel]) ** 0.5
        name = _kohya(path)
        lora[f"{name}.lora_down.weight"] = torch.randn(RANK, into, *kernel, generator=generator) * scale
        lora[f"{name}.lora_up.weight"] = torch.randn(out, RANK, *[1] * len(kernel), generator=generator) * 0.3
        lora[f"{name}.alpha"] = torch.tensor(ALPHA)
    return lora


def merged(unet: UNet2DConditionModel, lora: Mapping[str, Tensor], strength: float) -> UNet2DConditionModel:
    """Return a copy of the UNet with strength * alpha / rank * up @ down added to its weights, by hand."""
    unet = copy.deepcopy(unet)
    for path, module in targets(unet).items():
        down, up = (lora[f"{_kohya(path)}.{side}.weight"].flatten(1) for side in ("lora_down", "lora_up"))
        module.weight += strength * ALPHA / RANK * (up @ down).view_as(module.weight)
    return unet


def targets(unet: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    return {path: module for path, module in unet.named_modules() if path.endswith(TARGETS)}


def _kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")
