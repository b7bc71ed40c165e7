"""Which layers of a network get a LoRA, and their names in a file, by rules that hold for every family but UNets.

There is no list of names for each family. UNets have the layers and the names that diffusers and kohya give them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.utils
from torch import Tensor

from ....tcd import kohya_name, unet_layers
from ....tcd.adapter import layer_shapes
from ....tcd.errors import UserError
from ....tcd.lora_keys import UP

GROUPS = ("all", "attention", "feed_forward", "convolution")
_ATTENTION = re.compile(r"attn|attention|(^|[._])(to_)?(qkv|[qkvo])(_proj)?([._]|$)|proj_out|to_out")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|(^|[._])ff[._]|(^|[._])w[123]$")


class LayerNames:
    """The layers of a network of the host that can have a LoRA, and their names in a LoRA file."""

    def __init__(self, model: Any) -> None:
        """model: the host's BaseModel, which may be on the meta device."""
        self._model, self._unet_paths = model, _unet_paths(model)

    def chosen(self, targets: Sequence[str] = ("all",)) -> list[str]:
        """Return the paths of the layers that get a LoRA; targets: groups and kinds of layers.

        Raises UserError for unknown targets.
        """
        shapes = layer_shapes(self._model.diffusion_model)
        if not self._unet_paths:
            return chosen_layers(shapes, targets)
        paths = {name: path for path, name in self._unet_paths.items() if path in shapes}
        return [paths[name] for name in unet_layers.chosen_layers(paths, targets)]

    def kind(self, layer: str) -> str:
        """Return the kind of the layer at a path, such as qkv."""
        return unet_layers.kind_of(self._unet_paths.get(layer, "")) or kind_of(layer)

    def lora_key(self, layer: str) -> str:
        """Return the layer's name in a LoRA file: kohya's for UNets, otherwise the host's own, diffusion_model.PATH."""
        return kohya_name(self._unet_paths[layer]) if layer in self._unet_paths else f"diffusion_model.{layer}"

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the modules of a LoRA file that the host's own loader would leave out."""
        # The {} is needed: the host's function adds to its default argument.
        keys = comfy.lora.model_lora_keys_unet(self._model, {})
        loaded = comfy.lora.load_lora(dict(tensors), keys, log_missing=False)
        modules = [name.removesuffix(f".{UP}") for name in tensors if name.endswith(f".{UP}")]
        return [module for module in modules if keys.get(module) not in loaded]


def kind_of(path: str) -> str:
    """Return the last part of a layer's path that is no number, with the numbers after it, such as qkv or net.0."""
    parts = path.split(".")
    first = next((k for k in range(len(parts) - 1, -1, -1) if not parts[k].isdigit()), 0)
    return ".".join(parts[first:])


def chosen_layers(shapes: dict[str, tuple[int, ...]], targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that `targets`, groups and kinds, name, in the network's order.

    shapes: the weight shape of each layer that can have a LoRA, by path. Raises UserError for an unknown name.
    """
    kinds = dict.fromkeys(map(kind_of, shapes))
    unknown = [name for name in targets if name not in GROUPS and name not in kinds]
    if unknown or not targets:
        raise UserError(
            f"adapter.targets is {list(targets)}: use the groups {', '.join(GROUPS)}, or the kinds of this model, "
            f"{', '.join(kinds)}"
        )
    return [path for path, shape in shapes.items() if any(_is_in(path, shape, name) for name in targets)]


def _is_in(path: str, shape: tuple[int, ...], name: str) -> bool:
    match name:
        case "all":
            return True
        case "attention":
            return bool(_ATTENTION.search(path))
        case "feed_forward":
            return bool(_FEED_FORWARD.search(path)) and not _ATTENTION.search(path)
        case "convolution":
            return len(shape) > 2
    return kind_of(path) == name


def _unet_paths(model: Any) -> dict[str, str]:
    """Return the path in diffusers of each layer of a UNet, by its path in the host; empty for other networks."""
    by_diffusers = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return {
        path.removesuffix(".weight"): name.removesuffix(".weight")
        for name, path in by_diffusers.items()
        if name.endswith(".weight")
    }
