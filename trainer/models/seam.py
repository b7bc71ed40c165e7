"""The interface between the trainer and a model. Training, data and views use models only through these protocols.

    Checkpoint    a model on disk: what it is, and functions that load its parts
    Model         the network in memory with its adapter: the teacher with the adapter off, the student with it on
    TextEncoder   captions -> conditioning
    Autoencoder   pictures -> latents, and latents -> pictures

An engine implements all four for one kind of network, in a folder beside this file: `unet` for UNets by diffusers, and
`comfy` for all models of ComfyUI. It also says how LoRA files for its networks are laid out. `open_checkpoint` and
`lora_layouts` in __init__.py ask the engines.

Latents are [B, C, h, w] of pictures, and [B, C, F, h, w] of videos. They are normalized everywhere outside an
`Autoencoder`, which shifts and scales them as the network expects.

Conditioning is named tensors whose names only the engine reads. Encoded captions may differ in length. The trainer
stores each one without padding. `Checkpoint.collate` makes a batch of them: it pads them to the longest one, and adds a
mask to the named tensors. The trainer selects rows of a batch, and never joins two batches. The padding of a
row differs between batches, processes and micro-batches, so the network's prediction must not depend on it.

The clock is the engine's: the trainer knows times, levels and network times only through `Model.schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...tcd import AdapterWeights, Schedule, TargetInput, TimePoint
from ...tcd.distill import Distillable
from ..errors import UserError
from .conditioning import Conditioning
from .framing import Framing


class LatentFormat(NamedTuple):
    """The shape of latents."""

    channels: int
    stride: int
    """Pixels per latent cell, along height and width; picture sizes are multiples of it."""
    frames: int | None = None
    """Frames of a decoded video; None for pictures, whose latents have no frame dimension."""
    frame_stride: int = 1
    """Frames per latent frame of a video. The first frame has its own latent frame, as in a causal autoencoder."""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one latent for height x width pixels: [C, h, w], or [C, F, h, w] with frames."""
        frames = () if self.frames is None else (1 + (self.frames - 1) // self.frame_stride,)
        return (self.channels, *frames, height // self.stride, width // self.stride)

    def check_size(self, setting: str, pixels: int) -> None:
        """Raise UserError unless the value of a setting, in pixels, is a multiple of the stride."""
        if pixels % self.stride:
            raise UserError(f"{setting} is {pixels}: use a multiple of {self.stride}")


class LatentDistribution(NamedTuple):
    """The Gaussian posterior of the latents of B pictures, normalized, float32: mean and std of the scaled latents."""

    mean: Tensor
    """[B, *LatentFormat.shape]."""
    std: Tensor | None
    """[B, *LatentFormat.shape]; None if the autoencoder is deterministic."""


class StoredWeight(Protocol):
    """Where a layer's weight may be in a single-file checkpoint."""

    @property
    def name(self) -> str:
        """Key in the file."""
        ...

    def read(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight as a view of the file's tensor. Raises ValueError if it has another shape."""
        ...


class LoraLayout(NamedTuple):
    """The layers of a model family that can have a LoRA, by every kohya name that files give them."""

    family: str
    """As Checkpoint.family."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of the layer's weight, [out, in, ...]."""
    peft_names: Mapping[str, str]
    """The name in PEFT's format without `.lora_A.weight`, such as unet.mid_block.resnets.0.conv1."""
    stored: Mapping[str, Sequence[StoredWeight]]
    """Where the layer's weight may be in a single-file checkpoint; a checkpoint has one of them."""


class Fingerprints(NamedTuple):
    """Content hashes of a model's files. If a hash changes, rows that were computed with these files are invalid."""

    base: str
    """The hash of the network and the text encoders, and of the autoencoder unless it has its own files."""
    autoencoder: str | None = None
    """The hash of the autoencoder if it is not in `base`, as with base.vae; otherwise None."""
    text_encoders: str | None = None
    """The hash of the text encoders if captions stay valid when `base` changes, as with base.loras; otherwise None."""


class TextEncoder(Protocol):
    """Captions -> conditioning."""

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        """Encode each caption as one row, on the encoder's device, read as ComfyUI reads it: weights in brackets, and
        chunks of the encoder's length. Rows may differ in length, and have no padding.

        The cache stores floating-point tensors in float16, those above its maximum in float32, and returns all of them
        in float32; others keep their dtype.
        """
        ...

    def chunks(self, caption: str) -> int:
        """Return the number of chunks in which a caption is encoded. No weights are needed."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Move the encoder to a device, and return it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        ...


class Autoencoder(Protocol):
    """Pictures -> normalized latents, and back. Only an autoencoder knows the shift and the scale of normalization."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pictures, uint8 [B, 3, H, W]; a video model encodes each as a video without motion."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents [B, *LatentFormat.shape] to pictures, uint8 [B, 3, H, W].

        A video becomes one picture, with its frames side by side: W is the sum of their widths.
        """
        ...

    def to(self, device: torch.device) -> Autoencoder:
        """Move the autoencoder to a device, and return it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        ...


class Model(Distillable, Protocol):
    """A frozen network with its schedule and its adapter: what a step of training needs, and what a run needs beside.

    Its `network` may be compiled or sharded.
    """

    latents: LatentFormat
    always_recomputes: bool
    """Whether activations are recomputed in the backward pass also without `enable_gradient_checkpointing`."""

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        """Predict x0, float32 [B, C, ...], from x_t [B, C, ...] at t; s: target time, for an adapter that embeds it.

        If the network has the guidance scale as an input, the engine chooses its value here: the scale that the
        finished LoRA is used with.
        """
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

        uncond: the empty caption or a negative prompt, B rows or one, which may differ from cond in length. The engine
        chooses the kind of guidance: classifier-free, u + w (c - u), or w as an input of a guidance-distilled network,
        without uncond.
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
        """Return the name of the layer at a path in a LoRA file: the key without `.lora_down.weight`.

        The names of all layers that can have a LoRA must still differ after `kohya_name`.
        """
        ...

    def lora_names(self, layer: str) -> Sequence[str]:
        """Return every name that LoRA files give the layer at a path; the first is that of `lora_key`."""
        ...

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the modules of a LoRA file, by lora_key, that the program for which it is written would not load."""
        ...

    def x0_as_loaded(self, path: Path, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint) -> Tensor | None:
        """Predict x0 of one row as the program does for which a LoRA file is written, when it has loaded the file.

        None if the engine does not have that program. Raises ValueError if the program would not load the file.
        """
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
    latents: LatentFormat
    resolution: int
    """Usual side of the pictures of the model's family, in pixels."""
    guidance: float | None
    """The guidance scale that `Model.x0` gives the network as an input; None if it is no input."""
    notes: tuple[str, ...]
    """For the user: what was assumed about the model, and the setting that overrides each assumption."""

    @property
    def family(self) -> str:
        """The model family, such as sdxl."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule, with its training tables on the CPU."""
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

    def load_text_encoder(self, device: torch.device) -> TextEncoder:
        """Load the text encoders, frozen, to compute in float32. Raises UserError if one is incomplete."""
        ...

    def load_autoencoder(self, device: torch.device) -> Autoencoder:
        """Load the autoencoder, frozen, in float32, as `load` does. Raises UserError if it is incomplete."""
        ...

    def collate(self, captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
        """Join encoded captions of one row each, and the framing of their B pictures, into a batch for the network.

        Rows of different lengths are padded to the longest, with a mask that tells the network which part is padding.
        """
        ...

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        """Return conditioning of the longest captions with arbitrary content, for measuring memory."""
        ...

    def fingerprints(self) -> Fingerprints:
        """Return the fingerprints (fingerprint.py) of the files that affect training."""
        ...

    def lora_metadata(self) -> Mapping[str, str]:
        """Return the metadata about this model for a LoRA file, such as modelspec.* entries, which other tools read."""
        ...
