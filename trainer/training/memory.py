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
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.device import placed
from ..config.settings import Config
from ..data.buckets import Size
from ..data.encode import pictures_together
from ..data.pictures import to_signal
from ..format_bytes import readable
from ..models.unet import families as bases
from ..models.unet.adapter import adapters_off, add_adapter
from ..models.unet.text import CLIPS, MAX_TOKENS


class Settings(NamedTuple):
    """What the memory of a step depends on."""

    family: bases.Family
    rank: int
    batch: int
    """Pictures that are in the UNet at a time: those of a step, of one process and one part."""
    width: int
    height: int
    """In pixels."""
    dtype: torch.dtype = torch.float32
    """Of the frozen weights and the activations."""
    checkpointing: bool = False
    parts: int = 1
    """Parts of a step, one after another."""
    moment_bytes: int = 4
    """Of each of the two numbers that the optimizer remembers of a weight: 1 for the 8-bit one."""
    average: bool = False
    """Whether an exponential moving average of the adapter is kept."""
    calls: int = 1
    """Of the student in one prediction, whose activations are all kept: 2 for TCF(2)."""
    targets: tuple[str, ...] = ("all",)
    target_time: bool = False
    """Whether the UNet is told it."""
    preview: Size | None = None
    """Of a preview's picture, in pixels; None when none are drawn."""
    encoded: int = 1
    """Pictures that the VAE encodes in one call, for the cache."""
    drawn: bool = False
    """Whether the teacher draws the pictures itself, as many in one call."""

    @staticmethod
    def of(config: Config, family: bases.Family, dtype: torch.dtype) -> Settings:
        """Those of a configuration, for one process."""
        training, preview, side = config.training, config.preview, config.data.resolution
        device, _ = placed(config)
        return Settings(
            family,
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
            target_time=config.method.target_time,
            preview=Size(preview.height or side, preview.width or side) if preview.prompts else None,
            encoded=pictures_together(Size(side, side), device),
            drawn=any(path.endswith(".txt") for path in (source.path for _, source in config.data.named_sources)),
        )


class Memory(NamedTuple):
    """Bytes that a run takes at the peak of each of its phases, of which each gives back what it took."""

    weights: int
    """In training: of the frozen UNet."""
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
        parts = {"the frozen UNet": self.weights, "the adapter and its optimizer": self.adapter, "a step": self.step}
        listed = ", ".join(f"{readable(amount)} for {name}" for name, amount in parts.items())
        previews = f"{readable(self.preview)} with a preview" if self.preview else "no previews"
        return (
            f"{readable(self.total)} at the most: {readable(self.training)} in training ({listed}), {previews}, "
            f"{readable(self.caching)} while caching"
        )


def estimate(settings: Settings) -> Memory:
    """Return the memory that a run with these settings takes at the peak of each of its phases."""
    unet, parameters = _without_data(settings)
    trained = sum(parameter.numel() for parameter in parameters)
    frozen = sum(_bytes(parameter) for parameter in unet.parameters() if not parameter.requires_grad)
    adapter = (4 * (2 if settings.average else 1) + 2 * settings.moment_bytes) * trained
    drawing = frozen + _drawing(unet, settings) if settings.drawn else 0
    step = max(_training(unet, settings), 2 * 4 * trained)  # or the gradients, and one temporary number to a weight
    vae, vae_weights = _vae(settings)
    preview = 0
    if settings.preview:  # from the file's own adapter, beside the one in training
        preview = frozen + adapter + 4 * trained + vae_weights + _decoding(vae, settings.preview)
    encoding = vae_weights + _text_encoders(settings) + _encoding(vae, settings)
    return Memory(frozen, adapter, step, preview, max(encoding, drawing))


def _training(unet: UNet2DConditionModel, settings: Settings) -> int:
    """Of activations and gradients in a step."""
    inputs = _inputs(settings, unet, settings.batch)
    twice = _inputs(settings, unet, 2 * settings.batch)
    with _allocated(unet) as allocations:
        for _ in range(min(settings.parts, 2)):  # the second finds the gradients of the first there
            with torch.no_grad(), adapters_off(unet):
                unet(**twice)  # the teacher, guided: the largest of the calls without a gradient
            _predict(unet, inputs, settings.calls).float().square().mean().backward()
    return allocations.peak


@torch.no_grad()
def _drawing(unet: UNet2DConditionModel, settings: Settings) -> int:
    """Of activations while the teacher draws, guided, as many pictures as are encoded at a time."""
    inputs = _inputs(settings, unet, 2 * settings.encoded)
    with _allocated(unet) as allocations, adapters_off(unet):
        unet(**inputs)
    return allocations.peak


@torch.no_grad()
def _decoding(vae: AutoencoderKL, size: Size) -> int:
    """Of activations while one picture is decoded."""
    latent = torch.empty(1, vae.config.latent_channels, size.height // 8, size.width // 8, device="meta")
    with _allocated(vae) as allocations:
        vae.decode(latent)
    return allocations.peak


@torch.no_grad()
def _encoding(vae: AutoencoderKL, settings: Settings) -> int:
    """Of activations while pictures are encoded in one call, and of the pictures."""
    shape = (settings.encoded, 3, settings.height, settings.width)
    with _allocated(vae) as allocations:
        vae.encode(to_signal(torch.empty(shape, dtype=torch.uint8, device="meta")))
    return allocations.peak


def _vae(settings: Settings) -> tuple[AutoencoderKL, int]:
    """The VAE of a family on the meta device, in float32 as always, and its bytes."""
    with torch.device("meta"):
        vae = bases.empty_vae(settings.family).requires_grad_(False).eval()
    return vae, sum(map(_bytes, vae.parameters()))


def _text_encoders(settings: Settings) -> int:
    """Of the weights of a family's text encoders."""
    with torch.device("meta"):
        models = [bases.empty_text_encoder(settings.family, clip.part) for clip in CLIPS[settings.family]]
    return settings.dtype.itemsize * sum(parameter.numel() for model in models for parameter in model.parameters())


def _predict(unet: UNet2DConditionModel, inputs: dict[str, Any], calls: int) -> Tensor:
    output: Tensor = inputs["sample"]
    for _ in range(calls):
        output = unet(**{**inputs, "sample": output}).sample
    return output


def _without_data(settings: Settings) -> tuple[UNet2DConditionModel, list[nn.Parameter]]:
    """The UNet of a family with its adapter, on the meta device."""
    with torch.device("meta"):
        unet = bases.empty_unet(settings.family).requires_grad_(False).eval()
        nn.Module.to(unet, settings.dtype)  # diffusers' own `to` warns of modules that stay float32, and has none
        parameters = add_adapter(
            unet,
            rank=settings.rank,
            alpha=settings.rank,
            seed=0,
            targets=settings.targets,
            told="s" if settings.target_time else None,
        )
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, parameters


def _inputs(settings: Settings, unet: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    """What a UNet is called with for so many pictures, on the meta device."""
    config = unet.config

    def tensor(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=settings.dtype, device="meta")

    added = None
    if config.addition_embed_type == "text_time":
        # The projection takes six numbers, each embedded, and beside them the caption as one vector.
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": tensor(width), "time_ids": tensor(6).float()}
    return {
        "sample": tensor(4, settings.height // 8, settings.width // 8),
        "timestep": torch.empty(batch, dtype=torch.long, device="meta"),
        "class_labels": torch.empty((batch, 2), dtype=torch.long, device="meta"),
        "encoder_hidden_states": tensor(MAX_TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": added,
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _allocated(model: nn.Module) -> Iterator[_Allocations]:
    """Within the block what `model` allocates is counted, with attention as the fused kernels do it."""
    with _Allocations([*model.parameters(), *model.buffers()]) as allocations, _fused_attention():
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
