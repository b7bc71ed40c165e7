"""A network of ComfyUI as the trainer's `Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....tcd import AdapterWeights, Schedule, TargetInput, TimePoint, kohya_name
from ....tcd.adapter import layer_shapes
from ....tcd.distill.sharded import is_sharded
from ....tcd.lora_keys import UP
from .. import unet_layers
from ..conditioning import Conditioning
from ..seam import LatentFormat
from .conditioning import to_conditionings
from .layers import chosen_layers, kind_of
from .read_as_one import ReadAsOne
from .recognize import META


class HostModel:
    """A frozen network that ComfyUI has loaded, with its schedule and its adapter."""

    always_recomputes = True

    def __init__(self, patcher: Any, time_layer: str, latents: LatentFormat, unet_paths: dict[str, str]) -> None:
        """patcher: the host's MODEL. time_layer: the Linear whose output is the embedding of t.

        unet_paths: for a UNet, the path in diffusers of each layer; its LoRA is then the one that diffusers trains.
        """
        from ....nodes.host.training import HostNetwork

        self._host = HostNetwork(patcher, time_layer)
        self.adapter, self.latents, self._unet_paths = self._host.adapter, latents, unet_paths
        # Always, because many of the host's networks write over their activations, and have no gradient otherwise.
        self._host.enable_gradient_checkpointing()

    @property
    def network(self) -> nn.Module:
        """The diffusion model."""
        return self._host.network

    @property
    def schedule(self) -> Schedule:
        """The schedule of the host's model_sampling."""
        return self._host.schedule

    @property
    def device(self) -> torch.device:
        """The device on which the network computes."""
        return self._host.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        dtype: torch.dtype = self._host.model.get_dtype_inference()
        return dtype

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        """Predict x0, float32 [B, C, ...], from x_t [B, C, ...] at t; s: target time.

        Raises ValueError if the adapter in use has a target-time embedding and s is None.
        """
        self._host.one_by_one = is_sharded(self.network)
        with self._reading_numbers():
            return self._host.x0(x_t, t, to_conditionings(cond), s)

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        """Predict x0 with guidance scales w [B]: as an input of the network if it has one, otherwise u + w (c - u)."""
        self._host.one_by_one = is_sharded(self.network)
        with self._reading_numbers():
            return self._host.guided_x0(x_t, t, to_conditionings(cond), to_conditionings(uncond), guidance, s)

    def layers(self, targets: Sequence[str]) -> list[str]:
        """Return the paths of the layers that get a LoRA; raises UserError for unknown targets."""
        shapes = layer_shapes(self.network)
        if not self._unet_paths:
            return chosen_layers(shapes, targets)
        paths = {name: path for path, name in self._unet_paths.items() if path in shapes}
        return [paths[name] for name in unet_layers.chosen_layers(paths, targets)]

    def new_weights(
        self,
        *,
        rank: int,
        alpha: float,
        seed: int,
        targets: Sequence[str] = ("all",),
        target_input: TargetInput | None = None,
    ) -> AdapterWeights:
        """Return trainable adapter weights that initially change nothing."""
        return self._host.new_weights(
            self.layers(targets), rank=rank, alpha=alpha, seed=seed, target_input=target_input
        )

    def layer_kind(self, layer: str) -> str:
        """Return the kind of the layer at a path, such as qkv."""
        return unet_layers.kind_of(self._unet_paths.get(layer, "")) or kind_of(layer)

    def lora_key(self, layer: str) -> str:
        """Return the layer's name in a LoRA file: kohya's for UNets, otherwise the host's own, diffusion_model.PATH."""
        return kohya_name(self._unet_paths[layer]) if layer in self._unet_paths else f"diffusion_model.{layer}"

    def lora_names(self, layer: str) -> Sequence[str]:
        """Return the layer's lora_key, and the host's own name."""
        return self.lora_key(layer), f"diffusion_model.{layer}"

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the modules of a LoRA file that ComfyUI's own loader would leave out."""
        import comfy.lora

        # The {} is needed: the host's function adds to its default argument.
        keys = comfy.lora.model_lora_keys_unet(self._host.model, {})
        loaded = comfy.lora.load_lora(dict(tensors), keys, log_missing=False)
        modules = [name.removesuffix(f".{UP}") for name in tensors if name.endswith(f".{UP}")]
        return [module for module in modules if keys.get(module) not in loaded]

    def x0_as_loaded(self, path: Path, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint) -> Tensor:
        """Predict x0 of one row with a LoRA file as TCDLoraLoader applies it. Raises ValueError if it does not fit."""
        from ....nodes.host.lora_files import read_lora_at

        (conditioning,) = to_conditionings(cond)
        return self._host.x0_as_loaded(read_lora_at(path), x_t, t, conditioning, s)

    def blocks(self) -> list[nn.Module]:
        """Return the members of the outermost lists of modules, where a network repeats itself."""
        from ....nodes.host.training.recompute import blocks

        return blocks(self.network)

    def enable_gradient_checkpointing(self) -> None:
        """Change nothing: activations are always recomputed in the backward pass."""

    def _reading_numbers(self) -> AbstractContextManager[object]:
        """On the meta device, let the host read numbers, as it does to see whether a caption's mask is all ones."""
        return ReadAsOne() if self.device == META else nullcontext()
