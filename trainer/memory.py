"""How much memory a step of training takes, found by doing one on tensors that have shapes and no data.

Flows in: a family and the settings that matter.  Flows out: bytes, by what they are for.  What is counted is what torch
allocates: on a GPU, CUDA itself, the workspaces of its libraries and what lies between blocks come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import bases
from trainer.adapter import adapters_off, add_adapter
from trainer.config import Config
from trainer.text import MAX_TOKENS


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

    @staticmethod
    def of(config: Config, family: bases.Family, dtype: torch.dtype) -> Settings:
        """Those of a configuration, for one process."""
        training = config.training
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
        )


class Memory(NamedTuple):
    """Bytes that training takes at its peak, by what they are for."""

    weights: int
    """Of the frozen UNet."""
    adapter: int
    """Of the adapter in float32, its average if there is one, and what the optimizer remembers."""
    step: int
    """Of activations and gradients, at the moment when they are most."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.step

    def __str__(self) -> str:
        parts = {"the frozen UNet": self.weights, "the adapter and its optimizer": self.adapter, "a step": self.step}
        listed = ", ".join(f"{amount / 2**30:.2f} for {name}" for name, amount in parts.items())
        return f"{self.total / 2**30:.2f} GiB: {listed}"


def estimate(settings: Settings) -> Memory:
    """Return the memory that training with these settings takes at its peak."""
    unet, parameters = _without_data(settings)
    trained = sum(parameter.numel() for parameter in parameters)
    frozen = sum(_bytes(parameter) for parameter in unet.parameters() if not parameter.requires_grad)
    copies = 4 * (2 if settings.average else 1) + 2 * settings.moment_bytes
    inputs = _inputs(settings, unet)
    twice = {key: _double(value) for key, value in inputs.items()}
    with _Allocations([*unet.parameters(), *unet.buffers()]) as allocations, _fused_attention():
        for _ in range(min(settings.parts, 2)):  # the second finds the gradients of the first there
            with torch.no_grad(), adapters_off(unet):
                unet(**twice)  # the teacher, guided: the largest of the calls without a gradient
            _predict(unet, inputs, settings.calls).float().square().mean().backward()
    optimizer = 2 * 4 * trained  # the gradients, and one temporary number to a weight
    return Memory(frozen, copies * trained, max(allocations.peak, optimizer))


def _predict(unet: UNet2DConditionModel, inputs: dict[str, Any], calls: int) -> Tensor:
    output: Tensor = inputs["sample"]
    for _ in range(calls):
        output = unet(**{**inputs, "sample": output}).sample
    return output


def _without_data(settings: Settings) -> tuple[UNet2DConditionModel, list[nn.Parameter]]:
    """The UNet of a family with its adapter, on the meta device."""
    with torch.device("meta"):
        unet = bases.empty_unet(settings.family).requires_grad_(False).eval().to(settings.dtype)
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


def _inputs(settings: Settings, unet: UNet2DConditionModel) -> dict[str, Any]:
    """What a UNet is called with, on the meta device."""
    batch, config = settings.batch, unet.config

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


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _double(each) for key, each in value.items()}
    return None if value is None else torch.cat([value, value])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
