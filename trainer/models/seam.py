"""The interface between the trainer and a model. Training, data and views use models only through these protocols.

    Checkpoint    a model on disk: what it is, and functions that load its parts
    Model         the network in memory with its adapter: the teacher with the adapter off, the student with it on
    TextEncoder   captions -> conditioning
    Autoencoder   pictures -> latents, and latents -> pictures

An engine implements all four for one kind of network, in a folder beside this file; `unet` is the only one.
`open_checkpoint` in __init__.py chooses the engine.
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
    """The shape of latents. Latents are normalized everywhere: scaled as the network expects them."""

    channels: int
    stride: int
    """Pixels per latent cell, along height and width; picture sizes are multiples of it."""
    frames: int | None = None
    """Frames of a video latent; None for pictures, whose latents have no frame dimension."""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one latent for height x width pixels: [C, h, w], or [C, F, h, w] with frames."""
        frames = () if self.frames is None else (self.frames,)
        return (self.channels, *frames, height // self.stride, width // self.stride)


class LatentDistribution(NamedTuple):
    """The Gaussian posterior of the latents of B pictures, normalized, float32."""

    mean: Tensor
    """[B, *LatentFormat.shape]."""
    std: Tensor | None
    """[B, *LatentFormat.shape]; None if the autoencoder is deterministic."""


class TextEncoder(Protocol):
    """Captions -> conditioning."""

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as one row, on the encoder's device. Rows may differ in length."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Move the encoder to a device, and return it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        ...


class Autoencoder(Protocol):
    """Pictures -> latents, and latents -> pictures."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, *LatentFormat.shape] to pictures, uint8 [B, 3, H, W]."""
        ...

    def to(self, device: torch.device) -> Autoencoder:
        """Move the autoencoder to a device, and return it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        ...


class Model(Protocol):
    """A frozen network with its schedule and its adapter."""

    adapter: Adapter
    latents: LatentFormat

    @property
    def network(self) -> nn.Module:
        """The network itself, to be compiled or sharded."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule, with its training tables on the network's device."""
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
        """Predict x0, float32 [B, C, ...], from x_t [B, C, ...] at t; s: target time, for an adapter that embeds it."""
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
        """Predict x0 as `x0` does, with guidance scales w [B]; w = 1 is no guidance.

        uncond: the empty caption, B rows or one. The engine chooses the kind of guidance: classifier-free,
        u + w (c - u), or w as an input of a guidance-distilled network.
        """
        ...

    def layers(self, targets: Sequence[str]) -> list[str]:
        """Return the paths of the layers that get a LoRA; targets: groups and kinds of layers, as adapter.targets.

        Raises UserError if a name is neither a group nor a kind.
        """
        ...

    def new_weights(
        self, *, rank: int, alpha: float, seed: int, targets: Sequence[str], target_input: TargetInput | None = None
    ) -> AdapterWeights:
        """Return trainable adapter weights that initially change nothing.

        target_input: input of an embedding of the target time; None for no embedding.
        """
        ...

    def layer_kind(self, layer: str) -> str:
        """Return the kind of the layer at a path, one of those that adapter.targets names."""
        ...

    def lora_key(self, layer: str) -> str:
        """Return the name of the layer at a path in a LoRA file: the key without `.lora_down.weight`."""
        ...

    def blocks(self) -> list[nn.Module]:
        """Return the repeated blocks of the network: FSDP gathers the weights of one at a time."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """From now on, recompute activations in the backward pass instead of keeping them."""
        ...


class Checkpoint(Protocol):
    """A model on disk. Opening it only identifies it; the `load` methods read its weights."""

    path: Path
    name: str
    """Name of the file or folder, without suffix."""
    prediction: Prediction
    latents: LatentFormat
    resolution: int
    """Usual side of the pictures of the model's family, in pixels."""
    notes: tuple[str, ...]
    """For the user: what was assumed about the model, and the setting that overrides each assumption."""

    @property
    def family(self) -> str:
        """The model family, such as sdxl."""
        ...

    def describe(self) -> str:
        """Describe the model in one line."""
        ...

    def check_encoders(self) -> None:
        """Raise UserError if a text encoder or the autoencoder is missing."""
        ...

    def load(self, dtype: torch.dtype, device: torch.device) -> Model:
        """Load the network, frozen, with its weights in dtype; on the meta device only shapes are created.

        Raises UserError if the checkpoint is incomplete.
        """
        ...

    def load_text_encoder(self, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """Load the text encoders, frozen, as `load` does. Raises UserError if one is incomplete."""
        ...

    def load_autoencoder(self, device: torch.device) -> Autoencoder:
        """Load the autoencoder, frozen, in float32, as `load` does. Raises UserError if it is incomplete."""
        ...

    def collate(self, captions: Sequence[Conditioning], sizes: Tensor) -> Conditioning:
        """Join encoded captions of one row each into a batch of B rows for the network.

        sizes: [B, 6], in pixels: original height and width, top and left of the crop, target height and width.
        """
        ...

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Return conditioning of the usual shape with arbitrary content, for measuring memory."""
        ...

    def fingerprints(self) -> Mapping[str, str]:
        """Return a fingerprint (fingerprint.py) of each part that affects training, by the part's name."""
        ...

    def lora_metadata(self) -> Mapping[str, str]:
        """Return the metadata about this model for a LoRA file: modelspec.* and ss_* entries, as other tools read."""
        ...
