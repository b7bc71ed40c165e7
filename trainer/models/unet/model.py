"""The UNet of Stable Diffusion as a `Model`: predicts x0 in float32 from variance preserving noisy latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import Tensor, nn

from ....tcd import Adapter, AdapterWeights, Prediction, Schedule, TargetInput, TargetTime, TimePoint, kohya_name, to_x0
from ....tcd.adapter import new_weights
from ....tcd.unet_layers import chosen_layers, kind_of
from ..conditioning import Conditioning
from ..seam import LatentFormat
from .conditioning import MASK, join
from .ldm import unet_locations
from .lora_layouts import unet_names

TIME_LAYER = "time_embedding.linear_2"
_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


class UNetModel:
    """A frozen diffusers UNet with its schedule and its adapter."""

    always_recomputes = False

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, prediction: Prediction) -> None:
        """schedule: its clock is the timestep 0 .. 999, and its training tables are on the UNet's device."""
        self.network, self.schedule, self.prediction = unet, schedule, prediction
        self.latents = LatentFormat(channels=unet.config.in_channels, stride=8)
        self.adapter = Adapter(unet, TIME_LAYER)

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        device: torch.device = self.network.conv_in.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights and activations."""
        # Not unet.dtype, which walks over all parameters.
        dtype: torch.dtype = self.network.conv_in.weight.dtype
        return dtype

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        """Predict x0, float32 [B, 4, h, w], from x_t [B, 4, h, w] at t; s: target time.

        Raises ValueError if the adapter in use has a target-time embedding and s is None.
        """
        return to_x0(self._predict(x_t, t, cond, s), x_t, t.level, self.prediction)

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        """Predict x0 with classifier-free guidance u + w (c - u) of the raw predictions, in one call of 2 B rows.

        uncond: the empty caption or a negative prompt, B rows or one; guidance: w, [B].
        """
        both = join([cond, uncond.expand(len(cond))])
        raw = self._predict(torch.cat([x_t, x_t]), _twice(t), both, None if s is None else _twice(s))
        conditional, unconditional = rearrange(raw, "(halves b) ... -> halves b ...", halves=2)
        guided = unconditional + rearrange(guidance, "b -> b 1 1 1") * (conditional - unconditional)
        return to_x0(guided, x_t, t.level, self.prediction)

    def layers(self, targets: Sequence[str]) -> list[str]:
        """Return the paths of the layers that get a LoRA, in the UNet's order; raises UserError for unknown targets."""
        return chosen_layers((path for path, _ in self.network.named_modules()), targets)

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
        embedding = None
        if target_input:
            first = self.network.time_embedding.linear_1
            embedding = TargetTime.seeded(
                first.in_features, first.out_features, target_input=target_input, seed=seed, device=self.device
            )
        return new_weights(self.network, self.layers(targets), rank=rank, alpha=alpha, seed=seed, target_time=embedding)

    def layer_kind(self, layer: str) -> str:
        """Return the kind of the layer at a path, such as to_q."""
        kind = kind_of(layer)
        assert kind is not None
        return kind

    def lora_key(self, layer: str) -> str:
        """Return the layer's name in kohya's format, such as lora_unet_mid_block_resnets_0_conv1."""
        return kohya_name(layer)

    def lora_names(self, layer: str) -> Sequence[str]:
        """Return the layer's name in kohya's format, and the one by its key in a single file, as in SDXL's files."""
        weight = f"{layer}.weight"
        return unet_names(layer, unet_locations([weight], self.network.config)[weight])

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return none: the names are in the tables of kohya's format, which tests compare with ComfyUI's."""
        return []

    def x0_as_loaded(self, path: Path, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint) -> None:
        """Return None: ComfyUI is not here."""

    def blocks(self) -> list[nn.Module]:
        """Return the transformer and the residual blocks."""
        return [module for module in self.network.modules() if isinstance(module, _BLOCKS)]

    def enable_gradient_checkpointing(self) -> None:
        """From now on, recompute activations in the backward pass, by diffusers' gradient checkpointing."""
        self.network.enable_gradient_checkpointing()

    def _predict(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None) -> Tensor:
        """Return the raw prediction (eps, v or x0), float32; inputs are cast to the UNet's dtype."""
        dtype, tensors = self.dtype, cond.tensors
        added = None
        if "pooled" in tensors:
            # The sizes stay in float32: bfloat16 cannot represent every size, such as 1025.
            added = {"text_embeds": tensors["pooled"].to(dtype), "time_ids": tensors["time_ids"]}
        if s is None and self.adapter.target_time is not None:
            raise ValueError("the adapter has an embedding of the target time: give s")
        self.adapter.times = None if s is None else (t.network_time, s.network_time)
        output: Tensor = self.network(
            x_t.to(dtype),
            t.network_time,
            tensors["context"].to(dtype),
            added_cond_kwargs=added,
            encoder_attention_mask=tensors.get(MASK),
        ).sample
        return output.float()


def _twice(t: TimePoint) -> TimePoint:
    """Repeat the network times for the two halves of a batch; the level is not repeated, as `_predict` ignores it."""
    return t._replace(network_time=torch.cat([t.network_time, t.network_time]))
