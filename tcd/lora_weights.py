"""Adapter weights as the tensors of a LoRA file, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .adapter import AdapterWeights, Lora
from .lora_keys import ALPHA, DOWN, UP, LoraModule, kohya_name, lora_modules
from .target_time import PREFIX, TargetTime

LoraKey = Callable[[str], str]
"""(path of a layer in the network) -> its name in a LoRA file: the key without `.lora_down.weight`."""


def lora_tensors(weights: AdapterWeights, lora_key: LoraKey) -> dict[str, Tensor]:
    """Return adapter weights as the tensors of a LoRA file: down, up and alpha of each module, and the embedding.

    Only the alphas are copies.
    """
    tensors: dict[str, Tensor] = {}
    for layer, lora in weights.items():
        name = lora_key(layer)
        tensors |= {f"{name}.{DOWN}": lora.down.detach(), f"{name}.{UP}": lora.up.detach()}
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(lora.alpha))
    if weights.target_time is not None:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in weights.target_time.state_dict().items()}
    return tensors


@torch.no_grad()
def copy_lora(
    tensors: Mapping[str, Tensor], target_time: TargetTime | None, weights: AdapterWeights, lora_key: LoraKey
) -> None:
    """Copy a LoRA into trainable weights; if these are on the meta device, only check that it fits.

    tensors: of the LoRA, by kohya name; every module has an alpha. target_time: its embedding; if it has none, the
    embedding of `weights` keeps its values.

    Raises ValueError if the LoRA differs from `weights` in modules, shapes, alpha or target input. The message goes on
    after the name of the file.
    """
    layers = {kohya_name(lora_key(layer)): layer for layer in weights.paths}
    copy_modules(
        {layers.get(name, name): module for name, module in lora_modules(tensors)[0].items()}, target_time, weights
    )


@torch.no_grad()
def copy_modules(modules: Mapping[str, LoraModule], target_time: TargetTime | None, weights: AdapterWeights) -> None:
    """Copy the modules of a LoRA, by the paths of their layers, into trainable weights, as `copy_lora` does.

    Raises ValueError as `copy_lora`.
    """
    own = dict(weights.items())
    unmatched = sorted(modules.keys() ^ own.keys())
    if unmatched:
        raise ValueError(
            f"with {len(modules)} modules, and the adapter has {len(own)}; not in both are "
            f"{', '.join(unmatched[:3])} ...: use a LoRA for this base, and the adapter.targets that it was trained "
            "with"
        )
    for layer, module in modules.items():
        _copy_module(module.path, own[layer], module)
    _copy_embedding(weights.target_time, target_time)


def _copy_module(name: str, lora: Lora, module: LoraModule) -> None:
    found = {part: tuple(module.tensors[part].shape) for part in module.tensors.keys() - {ALPHA}}
    wanted = {DOWN: tuple(lora.down.shape), UP: tuple(lora.up.shape)}
    file_alpha = float(module.tensors[ALPHA])
    if found != wanted or file_alpha != lora.alpha:
        raise ValueError(
            f"where {name} has {found} and alpha {file_alpha:g}, but the adapter has {wanted} and alpha "
            f"{lora.alpha:g}: use its adapter.rank, {module.rank}, and adapter.alpha, {file_alpha:g}"
        )
    if not lora.down.is_meta:
        lora.down.copy_(module.tensors[DOWN])
        lora.up.copy_(module.tensors[UP])


def _copy_embedding(own: TargetTime | None, given: TargetTime | None) -> None:
    if given is None:
        return
    if own is None or own.target_input != given.target_input:
        raise ValueError(
            f"whose target-time embedding embeds {given.target_input}: use "
            f'method.target_time = true and method.target_input = "{given.target_input}"'
        )
    if not next(own.parameters()).is_meta:
        own.load_state_dict(given.state_dict())
