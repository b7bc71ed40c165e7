"""A network of ComfyUI as the trainer's `Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....tcd import AdapterWeights, Schedule, TargetInput, TimePoint
from ....tcd.distill.sharded import is_sharded
from ..conditioning import Conditioning
from ..seam import LatentFormat
from .conditioning import to_conditionings
from .read_as_one import ReadAsOne
from .recognize import META


class HostModel:
    """A frozen network that ComfyUI has loaded, with its schedule and its adapter."""

    always_recomputes = True

    def __init__(self, patcher: Any, time_layer: str, latents: LatentFormat) -> None:
        """patcher: the host's MODEL. time_layer: the Linear whose output is the embedding of t."""
        from ....nodes.host.training import HostNetwork

        self._host = HostNetwork(patcher, time_layer)
        self.adapter, self.latents = self._host.adapter, latents
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
        return self._host.dtype

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
        return self._host.names.chosen(targets)

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
        return self._host.names.kind(layer)

    def lora_key(self, layer: str) -> str:
        """Return the layer's name in a LoRA file: kohya's for UNets, otherwise the host's own, diffusion_model.PATH."""
        return self._host.names.lora_key(layer)

    def lora_names(self, layer: str) -> Sequence[str]:
        """Return the layer's lora_key, and the host's own name."""
        return self.lora_key(layer), f"diffusion_model.{layer}"

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the modules of a LoRA file that ComfyUI's own loader would leave out."""
        return self._host.names.unloaded_keys(tensors)

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
