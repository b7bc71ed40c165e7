"""Merges the user's own LoRAs into the UNet and the text encoders of a base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ....tcd import LoraModule, coverage, kohya_name
from ....tcd.adapter import layer_shapes
from ...config.base import BaseLora
from ...errors import UserError
from ...lora_file import check_plain_lora, module_update, read_lora, refuse_target_time
from ..base_loras import PlacedLora
from . import families
from .families import Family
from .text import CLIPS

UNET = "unet"
_Layer = tuple[str, str]
"""The part of the base, UNET or the part of a text encoder, and the layer's path in it."""
_TEXT_PREFIXES = {
    1: (("lora_te_", "lora_te1_", "text_encoder."),),
    2: (("lora_te1_", "text_encoder."), ("lora_te2_", "text_encoder_2.")),
}
"""For each number of text encoders: the prefixes of each one's layers in the spellings of kohya and of diffusers."""


class MergedLoras:
    """The LoRAs that a base gets when its parts are loaded; they are read and checked at once."""

    def __init__(self, loras: Sequence[BaseLora], family: Family) -> None:
        """Read the files. Raises UserError if one is no plain LoRA, or has a module that is not in the base."""
        self.placed: list[PlacedLora] = []
        self._modules: dict[_Layer, list[tuple[LoraModule, float]]] = defaultdict(list)
        shapes = dict(_shapes(family)) if loras else {}
        for number, lora in enumerate(loras):
            try:
                self._add(Path(lora.path).expanduser(), lora.strength, shapes)
            except UserError as error:
                raise UserError(f"base.loras[{number}]: {error}") from error

    def merge_into(self, part: str, model: nn.Module) -> None:
        """Add the LoRAs to the weights of one part: summed in float32, and rounded once to the weight's dtype."""
        for (which, path), modules in self._modules.items():
            if which == part:
                weight = model.get_submodule(path).get_parameter("weight")
                updates = [module_update(module, strength).view(weight.shape) for module, strength in modules]
                with torch.no_grad():
                    weight.copy_(weight.float() + torch.stack(updates).sum(0).to(weight.device))

    def _add(self, path: Path, strength: float, shapes: dict[str, tuple[_Layer, tuple[int, ...]]]) -> None:
        file = read_lora(path)
        refuse_target_time(file, path, "a base has none")
        fit = coverage(file.tensors, {name: shape for name, (_, shape) in shapes.items()})
        if not fit.complete:
            raise UserError(f"{path} does not fit the base: {fit.describe()}; use a LoRA for this base")
        for name, module in file.modules.items():
            check_plain_lora(f"{path}: {module.path}", module.tensors)
            self._modules[shapes[name][0]].append((module, strength))
        changes_text = any(shapes[name][0][0] != UNET for name in file.modules)
        self.placed.append(PlacedLora(path, strength, changes_text))


def _shapes(family: Family) -> Iterator[tuple[str, tuple[_Layer, tuple[int, ...]]]]:
    """Yield the names that a LoRA file can give a layer, as kohya_name spells them, with the layer and its shape."""
    for path, shape in families.layer_shapes(family).items():
        yield kohya_name(path), ((UNET, path), shape)
    clips = CLIPS[family]
    for clip, prefixes in zip(clips, _TEXT_PREFIXES[len(clips)], strict=True):
        with torch.device("meta"):
            shapes = layer_shapes(families.empty_text_encoder(family, clip.part))
        for path, shape in shapes.items():
            # Only some versions of transformers have the first part of these paths.
            in_file = f"text_model.{path.removeprefix('text_model.')}" if path != "text_projection" else path
            for prefix in prefixes:
                yield kohya_name(prefix + in_file), ((clip.part, path), shape)
