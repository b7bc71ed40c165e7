"""How much memory each phase of a run takes, found by going through it on tensors that have shapes and no data.

Flows in: a family and the settings that matter.  Flows out: bytes, by what they are for.  What is counted is what torch
allocates: on a GPU, CUDA itself, the workspaces of its libraries and what lies between blocks come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...tcd import AdapterWeights, TargetInput, TimePoint
from ...tcd.adapter import STUDENT
from ..config.device import device_and_dtype
from ..config.settings import Config
from ..data.buckets import Size
from ..data.encode import pictures_per_call
from ..format_bytes import format_bytes
from ..models.conditioning import Conditioning
from ..models.seam import Autoencoder, Checkpoint, Model

META = torch.device("meta")


class Settings(NamedTuple):
    """What the memory of a run depends on besides the model."""

    rank: int
    batch: int
    """Pictures in the network at a time: those of a step, of one process and one part."""
    width: int
    height: int
    """In pixels."""
    dtype: torch.dtype = torch.float32
    """Of the frozen weights and the activations."""
    checkpointing: bool = False
    parts: int = 1
    """Parts of a step, one after another."""
    moment_bytes: int = 4
    """Size of each of the optimizer's two moments of a weight: 1 for the 8-bit one."""
    average: bool = False
    """Whether an exponential moving average of the adapter is kept."""
    calls: int = 1
    """Calls of the student in one prediction, whose activations are all kept: 2 for TCF(2)."""
    targets: tuple[str, ...] = ("all",)
    target_input: TargetInput | None = None
    """What of the target time the network gets."""
    preview: Size | None = None
    """Size of a preview's picture, in pixels; None when none are drawn."""
    encoded: int = 1
    """Pictures that the autoencoder encodes in one call, for the cache."""
    drawn: bool = False
    """Whether the teacher draws the pictures itself, as many in one call."""

    @staticmethod
    def of(config: Config, dtype: torch.dtype) -> Settings:
        """Those of a configuration, for one process."""
        training, preview, side = config.training, config.preview, config.data.resolution
        device, _ = device_and_dtype(config)
        return Settings(
            rank=config.adapter.rank,
            batch=-(-training.batch // training.accumulate),
            width=config.data.resolution,
            height=config.data.resolution,
            dtype=dtype,
            checkpointing=training.gradient_checkpointing,
            parts=training.accumulate,
            moment_bytes=1 if training.optimizer == "adamw8bit" else 4,
            average=config.method.ema_decay > 0,
            calls=config.method.order,
            targets=config.adapter.targets,
            target_input=config.method.embedded,
            preview=Size(preview.height or side, preview.width or side) if preview.prompts else None,
            encoded=pictures_per_call(Size(side, side), device),
            drawn=any(path.endswith(".txt") for path in (source.path for _, source in config.data.named_sources)),
        )


class Memory(NamedTuple):
    """Bytes that a run takes at the peak of each of its phases, of which each gives back what it took."""

    weights: int
    """In training: of the frozen network."""
    adapter: int
    """In training: of the adapter in float32, its average if there is one, and what the optimizer remembers."""
    step: int
    """In training: of activations and gradients, at the moment when they are most."""
    preview: int
    """While previews are drawn, which is during training: all of it; 0 without previews."""
    caching: int
    """While pictures and captions are encoded, before training: all of it."""

    @property
    def training(self) -> int:
        """All of training but its previews."""
        return self.weights + self.adapter + self.step

    @property
    def total(self) -> int:
        """That of the phase that takes most."""
        return max(self.training, self.preview, self.caching)

    def __str__(self) -> str:
        parts = {"the frozen network": self.weights, "the adapter and its optimizer": self.adapter, "a step": self.step}
        listed = ", ".join(f"{format_bytes(amount)} for {name}" for name, amount in parts.items())
        previews = f"{format_bytes(self.preview)} with a preview" if self.preview else "no previews"
        return (
            f"{format_bytes(self.total)} at the most: {format_bytes(self.training)} in training ({listed}), "
            f"{previews}, {format_bytes(self.caching)} while caching"
        )


def estimate(checkpoint: Checkpoint, settings: Settings) -> Memory:
    """Return the memory that a run of this model takes at the peak of each of its phases."""
    model = checkpoint.load(settings.dtype, META)
    weights = model.adapter.add(STUDENT, _new_weights(model, settings))
    trained = sum(parameter.numel() for parameter in weights.parameters())
    frozen = sum(map(_bytes, model.network.parameters()))
    adapter = (4 * (2 if settings.average else 1) + 2 * settings.moment_bytes) * trained
    drawing = frozen + _drawing(checkpoint, model, settings) if settings.drawn else 0
    # or the gradients, and one temporary number to a weight
    step = max(_training(checkpoint, model, settings), 2 * 4 * trained)
    autoencoder = checkpoint.load_autoencoder(META)
    autoencoder_weights = sum(map(_bytes, autoencoder.parameters()))
    preview = 0
    if settings.preview:  # from the file's own adapter, beside the one in training
        decoding = _decoding(checkpoint, autoencoder, settings.preview)
        preview = frozen + adapter + 4 * trained + autoencoder_weights + decoding
    text_encoder = sum(map(_bytes, checkpoint.load_text_encoder(settings.dtype, META).parameters()))
    encoding = autoencoder_weights + text_encoder + _encoding(autoencoder, settings)
    return Memory(frozen, adapter, step, preview, max(encoding, drawing))


def _new_weights(model: Model, settings: Settings) -> AdapterWeights:
    return model.new_weights(
        rank=settings.rank, alpha=1.0, seed=0, targets=settings.targets, target_input=settings.target_input
    )


def _training(checkpoint: Checkpoint, model: Model, settings: Settings) -> int:
    """Activations and gradients in a step."""
    if settings.checkpointing:
        model.recompute_activations()
    x_t, t, cond = _inputs(checkpoint, model, settings, settings.batch)
    guidance = torch.empty(settings.batch, device=META)
    with _allocated(_weights(model)) as allocations:
        for _ in range(min(settings.parts, 2)):  # the second finds the gradients of the first there
            with torch.no_grad(), model.adapter.off():
                model.guided_x0(x_t, t, cond, cond, guidance)  # the largest of the calls without a gradient
            output = x_t
            for _ in range(settings.calls):
                output = model.x0(output, t, cond, t)
            output.square().mean().backward()
    return allocations.peak


@torch.no_grad()
def _drawing(checkpoint: Checkpoint, model: Model, settings: Settings) -> int:
    """Activations while the teacher draws, guided, as many pictures as are encoded at a time."""
    x_t, t, cond = _inputs(checkpoint, model, settings, settings.encoded)
    with _allocated(_weights(model)) as allocations, model.adapter.off():
        model.guided_x0(x_t, t, cond, cond, torch.empty(settings.encoded, device=META))
    return allocations.peak


@torch.no_grad()
def _decoding(checkpoint: Checkpoint, autoencoder: Autoencoder, size: Size) -> int:
    """Activations while one picture is decoded."""
    latent = torch.empty(1, *checkpoint.latents.shape(*size), device=META)
    with _allocated(autoencoder.parameters()) as allocations:
        autoencoder.decode(latent)
    return allocations.peak


@torch.no_grad()
def _encoding(autoencoder: Autoencoder, settings: Settings) -> int:
    """Activations while pictures are encoded in one call, and the pictures."""
    pixels = torch.empty(settings.encoded, 3, settings.height, settings.width, dtype=torch.uint8, device=META)
    with _allocated(autoencoder.parameters()) as allocations:
        autoencoder.encode(pixels)
    return allocations.peak


def _inputs(
    checkpoint: Checkpoint, model: Model, settings: Settings, batch: int
) -> tuple[Tensor, TimePoint, Conditioning]:
    """What a model is called with for so many pictures, without data."""
    x_t = torch.empty(batch, *model.latents.shape(settings.height, settings.width), device=META)
    t = model.schedule.point(torch.empty(batch, dtype=torch.long, device=META), x_t.ndim)
    return x_t, t, checkpoint.blank(batch, META)


def _weights(model: Model) -> list[nn.Parameter]:
    return [*model.network.parameters(), *model.adapter.weights[STUDENT].parameters()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _allocated(known: Iterable[Tensor]) -> Iterator[_Allocations]:
    """Within the block allocations besides the weights `known` are counted, with attention as fused kernels do it."""
    with _Allocations(known) as allocations, _fused_attention():
        yield allocations


class _Allocations(TorchDispatchMode):
    """Within the block, how many bytes are allocated that were not before it, now and at the most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.sizes = {storage._cdata: 0 for storage in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and one number to a query, as the fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)  # as the layers after it want it
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within the block attention is `_FusedAttention`: without data, torch takes the one that keeps every product."""
    real = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        output: Tensor = _FusedAttention.apply(query, key, value)
        return output

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real
