"""What the trainer asks of a model. Everything else in trainer/ goes through this file and names no architecture.

    Checkpoint    a model on disk: what it is, and how its parts are loaded
    Model         its network in memory with one adapter: the teacher with the adapter off, the student with it on
    TextEncoder   captions to conditioning
    Autoencoder   pictures to latents and back

An engine is a folder beside this file that has a class for each; `open_checkpoint` chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...tcd import Adapter, AdapterWeights, Prediction, Schedule, TargetInput, TimePoint
from .conditioning import Conditioning


class LatentFormat(NamedTuple):
    """The shape of what the network denoises. Latents are normalized throughout: as the network wants them."""

    channels: int
    stride: int
    """Pixels to a latent's cell, in height and in width; sides of pictures are multiples of it."""
    frames: int | None = None
    """Frames of a video's latent; None for pictures, whose latents have no such dimension."""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The latent of one picture of height x width pixels: [C, h, w], or [C, F, h, w]."""
        frames = () if self.frames is None else (self.frames,)
        return (self.channels, *frames, height // self.stride, width // self.stride)


class Encoded(NamedTuple):
    """The distribution of the latents of some pictures, normalized, float32."""

    mean: Tensor
    """[B, *LatentFormat.shape]."""
    std: Tensor | None
    """The same shape; None where the autoencoder gives no deviation."""


class TextEncoder(Protocol):
    """Captions to conditioning."""

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as one row, which may be of any length, on the encoder's device."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """The same encoder, moved to a device."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""
        ...


class Autoencoder(Protocol):
    """Pictures to latents and back."""

    def encode(self, pixels: Tensor) -> Encoded:
        """Encode pictures, uint8 [B, 3, H, W]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, *LatentFormat.shape] to pictures, uint8 [B, 3, H, W]."""
        ...

    def to(self, device: torch.device) -> Autoencoder:
        """The same autoencoder, moved to a device."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""
        ...


class Model(Protocol):
    """A frozen network, and the adapter that makes it the student."""

    adapter: Adapter
    latents: LatentFormat

    @property
    def network(self) -> nn.Module:
        """What is compiled, and spread over processes."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The clock, with its tables on the network's device."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        ...

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        """Estimate x0 [B, C, ...] float32 from x_t [B, C, ...] at t; s: the target time of networks that get it."""
        ...

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        """Estimate x0 as `x0` does, with guidance of scale [B], where 1 is none.

        The engine decides how: classifier-free, u + w (c - u), or as an input of a guidance-distilled network.
        """
        ...

    def layers(self, targets: Sequence[str]) -> list[str]:
        """The paths of the layers that get a LoRA, for groups and kinds as in adapter.targets.

        Raises UserError for a name that is neither.
        """
        ...

    def new_weights(
        self, *, rank: int, alpha: float, seed: int, targets: Sequence[str], target_input: TargetInput | None = None
    ) -> AdapterWeights:
        """Trainable adapter weights that change nothing yet; target_input: what is embedded."""
        ...

    def kind(self, layer: str) -> str:
        """The kind of a layer, as in adapter.targets."""
        ...

    def key(self, layer: str) -> str:
        """The name of a layer in a LoRA file, before `.lora_down.weight`."""
        ...

    def blocks(self) -> list[nn.Module]:
        """The blocks that repeat in the network, which FSDP gathers one at a time."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Keep few activations for the gradient from here on, and compute the others again (gradient checkpointing)."""
        ...


class Checkpoint(Protocol):
    """A model on disk. It is open, and none of its weights are read yet."""

    path: Path
    name: str
    """Without folder and ending."""
    prediction: Prediction
    latents: LatentFormat
    resolution: int
    """The side in pixels of the pictures that it was trained on."""
    notes: tuple[str, ...]
    """What was assumed of the model, and how to set it."""

    @property
    def family(self) -> str:
        """The kind of model, in one word."""
        ...

    def describe(self) -> str:
        """Say in a line what the model is."""
        ...

    def check_encoders(self) -> None:
        """Raise UserError if a text encoder or the autoencoder is missing."""
        ...

    def load(self, dtype: torch.dtype, device: torch.device) -> Model:
        """Load the network, frozen, its weights in dtype; on the meta device it gets shapes and no data.

        Raises UserError if the checkpoint is not complete.
        """
        ...

    def load_text_encoder(self, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """Load the text encoders as `load` does the network."""
        ...

    def load_autoencoder(self, device: torch.device) -> Autoencoder:
        """Load the autoencoder as `load` does the network, in float32."""
        ...

    def join(self, captions: Sequence[Conditioning], sizes: Tensor) -> Conditioning:
        """Join the rows of several captions for one call of the network.

        sizes: [B, 6], of each picture the original height and width, crop top and left, target height and width.
        """
        ...

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Conditioning of the usual shape without content, to measure memory with."""
        ...

    def fingerprints(self) -> Mapping[str, str]:
        """A hash of the content of each part that a run is made from, by its name."""
        ...

    def metadata(self) -> Mapping[str, str]:
        """What a LoRA file for this model says of it: modelspec.* and ss_* entries, which other tools read."""
        ...
