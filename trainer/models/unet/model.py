"""The UNet as the trainer's model: x0 in float32 from noisy latents in the paper's (variance preserving) scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import Tensor, nn

from ....tcd import Adapter, AdapterWeights, Prediction, Schedule, TargetInput, TargetTime, TimePoint, kohya_name, to_x0
from ....tcd.adapter import new_weights
from ..conditioning import Conditioning
from ..seam import LatentFormat
from .targets import TARGETS, kinds_of

TIME_LAYER = "time_embedding.linear_2"
_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


class UNetModel:
    """A frozen UNet of diffusers with its schedule and its adapter."""

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, prediction: Prediction) -> None:
        """schedule: of training timesteps, with its tables on the UNet's device."""
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
        # That of a layer at hand: diffusers' own property walks all parameters.
        dtype: torch.dtype = self.network.conv_in.weight.dtype
        return dtype

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        """Estimate x0 [B, 4, h, w] from x_t [B, 4, h, w] at t; an adapter with an embedding of s needs s."""
        return to_x0(self._output(x_t, t, cond, s), x_t, t.level, self.prediction)

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        """Estimate x0 with classifier-free guidance u + w (c - u), both halves in one batched call.

        uncond: one row, or as many as cond has; guidance: w, [B].
        """
        both = Conditioning.cat([cond, uncond.expand(len(cond))])
        output = self._output(torch.cat([x_t, x_t]), _twice(t), both, None if s is None else _twice(s))
        given, free = rearrange(output, "(halves b) ... -> halves b ...", halves=2)
        output = free + rearrange(guidance, "b -> b 1 1 1") * (given - free)
        return to_x0(output, x_t, t.level, self.prediction)

    def layers(self, targets: Sequence[str]) -> list[str]:
        """The paths of the layers of these groups and kinds, in the UNet's order."""
        ends = tuple(f".{kind}" for kind in kinds_of(targets))
        return [path for path, _ in self.network.named_modules() if path.endswith(ends)]

    def new_weights(
        self,
        *,
        rank: int,
        alpha: float,
        seed: int,
        targets: Sequence[str] = ("all",),
        target_input: TargetInput | None = None,
    ) -> AdapterWeights:
        """Trainable adapter weights that change nothing yet."""
        embedding = None
        if target_input:
            first = self.network.time_embedding.linear_1
            with torch.random.fork_rng(devices=[]), torch.device(self.device):
                torch.manual_seed(seed)  # torch initializes layers from the global generator
                embedding = TargetTime(first.in_features, first.out_features, target_input=target_input)
        return new_weights(self.network, self.layers(targets), rank=rank, alpha=alpha, seed=seed, target_time=embedding)

    def layer_kind(self, layer: str) -> str:
        """The kind of a layer, such as to_q."""
        return next(kind for kind in TARGETS if layer.endswith(f".{kind}"))

    def lora_key(self, layer: str) -> str:
        """The layer's kohya name."""
        return kohya_name(layer)

    def blocks(self) -> list[nn.Module]:
        """Transformer and residual blocks."""
        return [module for module in self.network.modules() if isinstance(module, _BLOCKS)]

    def enable_gradient_checkpointing(self) -> None:
        """Use diffusers' own gradient checkpointing."""
        self.network.enable_gradient_checkpointing()

    def _output(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None) -> Tensor:
        """The raw prediction in float32; the UNet alone sees its own dtype."""
        dtype, given = self.dtype, cond.tensors
        added = None
        if "pooled" in given:
            # The sizes stay in float32: bfloat16 has no 1000.
            added = {"text_embeds": given["pooled"].to(dtype), "time_ids": given["time_ids"]}
        if s is None and self.adapter.target_time is not None:
            raise ValueError("the adapter has an embedding of the target time: give s")
        self.adapter.times = None if s is None else (t.network_time, s.network_time)
        output: Tensor = self.network(
            x_t.to(dtype), t.network_time, given["context"].to(dtype), added_cond_kwargs=added
        ).sample
        return output.float()


def _twice(t: TimePoint) -> TimePoint:
    """The same times for two halves of a batch; the level is not needed twice."""
    return t._replace(network_time=torch.cat([t.network_time, t.network_time]))
