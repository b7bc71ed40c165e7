"""LoRAs with random weights for the mini UNet in kohya names, and the UNet with a LoRA merged by hand."""

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
MODULES = 65  # modules of the mini UNet that match TARGETS


def random_lora(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA in kohya names on every target of the UNet, large enough to change the output visibly."""
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
    """Return a copy of the UNet with strength * alpha / rank * up @ down added to its weights, by hand.

    A missing alpha means alpha = rank. lora_mid is multiplied between up and down; with dora_scale it is a DoRA.
    """
    unet = copy.deepcopy(unet)
    for path, module in targets(unet).items():
        name = _kohya(path)
        change = _product(lora, name).view_as(module.weight)
        if f"{name}.dora_scale" in lora:
            change = _decomposed(module.weight, change, lora[f"{name}.dora_scale"]) - module.weight
        module.weight += strength * change
    return unet


def _product(lora: Mapping[str, Tensor], name: str) -> Tensor:
    down, up = (lora[f"{name}.{side}.weight"].float().flatten(1) for side in ("lora_down", "lora_up"))
    alpha = float(lora.get(f"{name}.alpha", len(down)))
    core = lora.get(f"{name}.lora_mid.weight")
    product = up @ down if core is None else torch.einsum("or,rskl,si->oikl", up, core, down)
    return alpha / len(down) * product


def _decomposed(weight: Tensor, change: Tensor, scale: Tensor) -> Tensor:
    """Return the weight of a DoRA: scale / norm * (weight + change), per output or per input.

    Per output, ComfyUI divides by the norm of the original weight, not by that of the sum.
    """
    by_outputs = len(scale) == len(weight)
    axes = [axis for axis in range(weight.ndim) if axis != (0 if by_outputs else 1)]
    norm = torch.linalg.vector_norm(weight if by_outputs else weight + change, dim=axes, keepdim=True)
    return scale / norm * (weight + change)


def targets(unet: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    return {path: module for path, module in unet.named_modules() if path.endswith(TARGETS)}


def _kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")
