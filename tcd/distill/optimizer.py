"""The optimizer, its learning rate as a function of the step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .settings import Optimization


def make_optimizer(
    kind: type[torch.optim.Optimizer],
    parameters: Sequence[nn.Parameter],
    training: Optimization,
    embedding: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return an optimizer over `parameters`; those that are also in `embedding` get training.target_time_lr."""
    options: dict[str, Any] = {"fused": True} if kind is torch.optim.AdamW and parameters[0].is_cuda else {}
    embedding_ids = {id(parameter) for parameter in embedding}
    groups = [
        {"params": [each for each in parameters if id(each) not in embedding_ids], "peak": training.lr},
        {"params": [each for each in parameters if id(each) in embedding_ids], "peak": training.target_time_lr},
    ]
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=training.lr, weight_decay=training.weight_decay, **options)  # type: ignore[call-arg]


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, training: Optimization) -> float:
    """Set the learning rate of every parameter group for a step, counted from 0; return the LoRA's rate."""
    factor = lr_factor(step, training.steps, training.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return training.lr * factor


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Return learning rate / peak at a step, counted from 0: linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: `INDEX.NAME`, or `INDEX.NAME.NAME` for a nested state.

    Integers become int64 scalars. Tensors that share memory are cloned, since a safetensors file cannot hold them.
    """
    flat = {name: torch.as_tensor(value) for name, value in _flatten(optimizer.state_dict()["state"])}
    first = {tensor.data_ptr(): name for name, tensor in reversed(flat.items())}
    return {name: tensor if first[tensor.data_ptr()] == name else tensor.clone() for name, tensor in flat.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_state` returned into an optimizer over the same parameters."""
    state: dict[Any, Any] = {}
    for key, value in tensors.items():
        index, *path, name = key.split(".")
        nested = state.setdefault(int(index), {})
        for each in path:
            nested = nested.setdefault(each, {})
        is_integer = value.dim() == 0 and value.dtype == torch.int64
        nested[name] = int(value) if is_integer else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings under their keys, joined by dots: bitsandbytes nests its moments."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
