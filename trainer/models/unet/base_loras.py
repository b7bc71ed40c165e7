"""Merges the user's own LoRAs into the UNet and the text encoders of a base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ....tcd import LoraModule, coverage
from ...config.base import BaseLora
from ...errors import UserError
from ...lora_file import by_layer, check_plain_lora, module_update, read_lora, refuse_target_time
from ...user_path import user_path
from ..base_loras import PlacedLora
from .families import Family
from .lora_layouts import UNET, LoraLayer, lora_layers


class MergedLoras:
    """The LoRAs that a base gets when its parts are loaded; they are read and checked at once."""

    def __init__(self, loras: Sequence[BaseLora], family: Family) -> None:
        """Read the files. Raises UserError if one is no plain LoRA, or has a module that is not in the base."""
        self.placed: list[PlacedLora] = []
        self._modules: dict[LoraLayer, list[tuple[LoraModule, float]]] = defaultdict(list)
        layers = lora_layers(family) if loras else {}
        for number, lora in enumerate(loras):
            try:
                self._add(user_path(lora.path), lora.strength, layers)
            except UserError as error:
                raise UserError(f"base.loras[{number}]: {error}") from error

    def merge_into(self, part: str, model: nn.Module) -> None:
        """Add the LoRAs to the weights of one part: summed in float32, and rounded once to the weight's dtype."""
        for layer, modules in self._modules.items():
            if layer.part == part:
                weight = model.get_submodule(layer.path).get_parameter("weight")
                updates = [module_update(module, strength).view(weight.shape) for module, strength in modules]
                with torch.no_grad():
                    weight.copy_(weight.float() + torch.stack(updates).sum(0).to(weight.device))

    def _add(self, path: Path, strength: float, layers: Mapping[str, LoraLayer]) -> None:
        file = read_lora(path)
        refuse_target_time(file, path, "a base has none")
        for module in file.modules.values():
            check_plain_lora(f"{path}: {module.path}", module.tensors)
        fit = coverage(file.tensors, {name: layer.shape for name, layer in layers.items()})
        if not fit.complete:
            raise UserError(f"{path} does not fit the base: {fit.describe()}; use a LoRA for this base")
        found = by_layer(file.modules, layers, path)
        for layer, module in found.items():
            self._modules[layer].append((module, strength))
        self.placed.append(PlacedLora(path, strength, any(layer.part != UNET for layer in found)))
