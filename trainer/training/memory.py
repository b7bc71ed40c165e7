"""Estimate the peak memory of each phase of a run, by executing it on the meta device and counting allocations.

Only torch's own allocations are counted. On a GPU, the CUDA context, library workspaces and fragmentation come on top.
"""

from __future__ import annotations

import logging
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
_USABLE = 0.9  # of the free memory, for "auto"; library workspaces and fragmentation take the rest
log = logging.getLogger("trajectory-consistency")


class MemorySettings(NamedTuple):
    """The settings that the memory of a run depends on, besides the model."""

    rank: int
    """Rank of the LoRA."""
    batch: int
    """Pictures per micro-batch."""
    width: int
    """Width of the training pictures, in pixels."""
    height: int
    """Height of the training pictures, in pixels."""
    dtype: torch.dtype = torch.float32
    """Dtype of the frozen weights and the activations."""
    gradient_checkpointing: bool = False
    accumulate: int = 1
    """Micro-batches per step."""
    moment_bytes: int = 4
    """Bytes per weight of each of AdamW's two moments: 4, or 1 for the 8-bit optimizer."""
    ema: bool = False
    """Whether a moving average of the adapter is kept."""
    student_calls: int = 1
    """Student calls in one prediction, each with its activations kept for the gradient: 2 for TCF(2)."""
    targets: tuple[str, ...] = ("all",)
    """As adapter.targets."""
    target_input: TargetInput | None = None
    """The input of the target-time embedding; None for no embedding."""
    preview: Size | None = None
    """Size of a preview picture in pixels; None for no previews."""
    encode_batch: int = 1
    """Pictures per call of the autoencoder, and of the sampling teacher, while the cache is filled."""
    teacher_samples: bool = False
    """Whether the teacher samples training latents from prompts alone."""

    @staticmethod
    def from_config(config: Config, dtype: torch.dtype) -> MemorySettings:
        """Return the settings of a configuration, for a run in a single process."""
        training, preview, side = config.training, config.preview, config.data.resolution
        device, _ = device_and_dtype(config)
        return MemorySettings(
            rank=config.adapter.rank,
            batch=-(-training.batch // training.parts),
            width=config.data.resolution,
            height=config.data.resolution,
            dtype=dtype,
            gradient_checkpointing=training.gradient_checkpointing,
            accumulate=training.parts,
            moment_bytes=1 if training.optimizer == "adamw8bit" else 4,
            ema=config.method.ema_decay > 0,
            student_calls=config.method.order,
            targets=config.adapter.targets,
            target_input=config.method.embedded_input,
            preview=Size(preview.height or side, preview.width or side) if preview.prompts else None,
            encode_batch=pictures_per_call(Size(side, side), device),
            teacher_samples=any(
                path.endswith(".txt") for path in (source.path for _, source in config.data.named_sources)
            ),
        )


class MemoryEstimate(NamedTuple):
    """Peak memory of each phase of a run, in bytes. A phase frees its memory before the next one starts."""

    weights: int
    """Training: the frozen network."""
    adapter: int
    """Training: the float32 adapter, its moving average if there is one, and the optimizer's state."""
    step: int
    """Training: peak of activations and gradients."""
    preview: int
    """Total while a preview is sampled during training; 0 without previews."""
    caching: int
    """Total while pictures and captions are encoded, before training."""

    @property
    def training(self) -> int:
        """Total while training, outside previews."""
        return self.weights + self.adapter + self.step

    @property
    def total(self) -> int:
        """Total of the phase that needs the most."""
        return max(self.training, self.preview, self.caching)

    def __str__(self) -> str:
        parts = {"the frozen network": self.weights, "the adapter and its optimizer": self.adapter, "a step": self.step}
        listed = ", ".join(f"{format_bytes(amount)} for {name}" for name, amount in parts.items())
        previews = f"{format_bytes(self.preview)} with a preview" if self.preview else "no previews"
        return (
            f"{format_bytes(self.total)} at the most: {format_bytes(self.training)} in training ({listed}), "
            f"{previews}, {format_bytes(self.caching)} while caching"
        )


def estimate_memory(checkpoint: Checkpoint, settings: MemorySettings) -> MemoryEstimate:
    """Estimate the peak memory of each phase of a run with this model."""
    model = checkpoint.load(settings.dtype, META)
    estimate = _estimate_training(checkpoint, model, settings)
    frozen, trained = estimate.weights, _trained(model)
    sampling = frozen + _teacher_sampling(checkpoint, model, settings) if settings.teacher_samples else 0
    autoencoder = checkpoint.load_autoencoder(META)
    autoencoder_weights = sum(map(_bytes, autoencoder.parameters()))
    preview = 0
    if settings.preview:  # the preview loads the adapter from its file, beside the one in training
        decoding = _decoding(checkpoint, autoencoder, settings.preview)
        preview = frozen + estimate.adapter + 4 * trained + autoencoder_weights + decoding
    text_encoder = sum(map(_bytes, checkpoint.load_text_encoder(META).parameters()))
    encoding = autoencoder_weights + text_encoder + _encoding(autoencoder, settings)
    return estimate._replace(preview=preview, caching=max(encoding, sampling))


def estimate_training(checkpoint: Checkpoint, settings: MemorySettings) -> MemoryEstimate:
    """Estimate the peak memory of training alone, without previews and caching."""
    return _estimate_training(checkpoint, checkpoint.load(settings.dtype, META), settings)


def _estimate_training(checkpoint: Checkpoint, model: Model, settings: MemorySettings) -> MemoryEstimate:
    """Add a student to a model on the meta device, and return the estimate for training it."""
    model.adapter.add(STUDENT, _new_weights(model, settings))
    trained = _trained(model)
    frozen = sum(map(_bytes, (*model.network.parameters(), *model.network.buffers())))
    adapter = (4 * (2 if settings.ema else 1) + 2 * settings.moment_bytes) * trained
    # In the optimizer step: the gradients, and one temporary float32 per weight.
    step = max(_training(checkpoint, model, settings), 2 * 4 * trained)
    return MemoryEstimate(frozen, adapter, step, preview=0, caching=0)


def _trained(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.adapter.weights[STUDENT].parameters())


def choose_accumulate(
    config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, processes: int = 1
) -> int:
    """Return training.accumulate; for "auto", the smallest number with which a CUDA GPU has enough free memory.

    If no number is enough, it is that with one picture at a time. Elsewhere than on a CUDA GPU "auto" is 1.
    """
    training = config.training
    if training.accumulate != "auto" or device.type != "cuda":
        return training.parts
    free, _ = torch.cuda.mem_get_info(device)
    rows = training.batch // processes
    settings = MemorySettings.from_config(config, dtype)._replace(preview=None, teacher_samples=False)
    for parts in (number for number in range(1, rows + 1) if rows % number == 0):
        needed = estimate_memory(checkpoint, settings._replace(batch=rows // parts, accumulate=parts)).training
        if needed <= _USABLE * free:
            break
    log.info(
        "training.accumulate is auto: %d, for which training takes about %s of %s that are free",
        parts,
        format_bytes(needed),
        format_bytes(free),
    )
    return parts


def _new_weights(model: Model, settings: MemorySettings) -> AdapterWeights:
    return model.new_weights(
        rank=settings.rank, alpha=1.0, seed=0, targets=settings.targets, target_input=settings.target_input
    )


def _training(checkpoint: Checkpoint, model: Model, settings: MemorySettings) -> int:
    """Return the peak of activations and gradients in a step."""
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    x_t, t, cond = _inputs(checkpoint, model, settings, settings.batch)
    guidance = torch.empty(settings.batch, device=META)
    with _allocated(_weights(model)) as allocations:
        for _ in range(min(settings.accumulate, 2)):  # from the second micro-batch on, gradients exist already
            with torch.no_grad(), model.adapter.off():
                model.guided_x0(x_t, t, cond, cond, guidance)  # the largest call without a gradient
            output = x_t
            for _ in range(settings.student_calls):
                output = model.x0(output, t, cond, t)
            output.square().mean().backward()
    return allocations.peak


@torch.no_grad()
def _teacher_sampling(checkpoint: Checkpoint, model: Model, settings: MemorySettings) -> int:
    """Return the peak of activations while the teacher samples `encode_batch` pictures with guidance."""
    x_t, t, cond = _inputs(checkpoint, model, settings, settings.encode_batch)
    with _allocated(_weights(model)) as allocations, model.adapter.off():
        model.guided_x0(x_t, t, cond, cond, torch.empty(settings.encode_batch, device=META))
    return allocations.peak


@torch.no_grad()
def _decoding(checkpoint: Checkpoint, autoencoder: Autoencoder, size: Size) -> int:
    """Return the peak of activations while one picture is decoded."""
    latent = torch.empty(1, *checkpoint.latents.shape(*size), device=META)
    with _allocated(autoencoder.parameters()) as allocations:
        autoencoder.decode(latent)
    return allocations.peak


@torch.no_grad()
def _encoding(autoencoder: Autoencoder, settings: MemorySettings) -> int:
    """Return the peak of activations while `encode_batch` pictures are encoded, including the pictures."""
    pixels = torch.empty(settings.encode_batch, 3, settings.height, settings.width, dtype=torch.uint8, device=META)
    with _allocated(autoencoder.parameters()) as allocations:
        autoencoder.encode(pixels)
    return allocations.peak


def _inputs(
    checkpoint: Checkpoint, model: Model, settings: MemorySettings, batch: int
) -> tuple[Tensor, TimePoint, Conditioning]:
    """Return inputs for a call of the network with `batch` pictures, on the meta device."""
    x_t = torch.empty(batch, *model.latents.shape(settings.height, settings.width), device=META)
    t = model.schedule.point(torch.empty(batch, dtype=torch.long, device=META), x_t.ndim)
    return x_t, t, checkpoint.placeholder_conditioning(batch, META)


def _weights(model: Model) -> list[nn.Parameter]:
    return [*model.network.parameters(), *model.adapter.weights[STUDENT].parameters()]


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight: its numbers, and their scales
        parts, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, part)) for part in parts)
    size: int = tensor.numel() * tensor.element_size()
    return size


@contextmanager
def _allocated(known: Iterable[Tensor]) -> Iterator[_Allocations]:
    """Count allocations within the block, except the tensors `known`; attention is counted as a fused kernel."""
    with _Allocations(known) as allocations, _fused_attention():
        yield allocations


class _Allocations(TorchDispatchMode):
    """Within the block, `now` and `peak` count the bytes allocated since it began."""

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
    """Attention that saves its inputs, its output and one number per query for the gradient, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Strided so that the reshape after the attention needs no copy.
        output = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Use `_FusedAttention` within the block: on the meta device, torch would keep the full attention matrix."""
    original = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        output: Tensor = _FusedAttention.apply(query, key, value)
        return output

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
