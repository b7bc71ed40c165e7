"""The optimizer: which one, how fast at each step, and its state as named tensors.

Flows in: parameters and settings.  Flows out: a torch optimizer whose learning rate is a function of the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.settings import TrainingConfig
from ..errors import UserError


def optimizer_class(training: TrainingConfig) -> type[torch.optim.Optimizer]:
    """AdamW, or the one that keeps its moments in 8 bits.

    Raises UserError when bitsandbytes, which has that, is not installed.
    """
    if training.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"training.optimizer is {training.optimizer!r}, which needs bitsandbytes ({error}): "
            "pip install bitsandbytes, or use adamw"
        ) from error
    found: type[torch.optim.Optimizer] = AdamW8bit
    return found


def make_optimizer(
    parameters: Sequence[nn.Parameter], training: TrainingConfig, embedding: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer over `parameters`, of which those of `embedding` have a learning rate of their own.

    Raises UserError as `optimizer_class` does.
    """
    kind = optimizer_class(training)
    # One kernel for all of the parameters, where there is one.
    options: dict[str, Any] = {"fused": True} if kind is torch.optim.AdamW and parameters[0].is_cuda else {}
    apart = {id(parameter) for parameter in embedding}
    groups = [
        {"params": [each for each in parameters if id(each) not in apart], "peak": training.lr},
        {"params": [each for each in parameters if id(each) in apart], "peak": training.target_time_lr},
    ]
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=training.lr, weight_decay=training.weight_decay, **options)  # type: ignore[call-arg]


def set_rate(optimizer: torch.optim.Optimizer, step: int, training: TrainingConfig) -> float:
    """Give the optimizer the learning rates of a step, counted from 0, and return that of the LoRA."""
    factor = lr_factor(step, training.steps, training.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return training.lr * factor


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate at a step as a share of its peak: linear warm-up, then a cosine that ends at zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything the optimizer remembers, as `index.name`, or `index.name.name` of what it keeps in a mapping of names.

    A whole number is an int64 without dimensions.  No two tensors share memory, as those of a file must not.
    """
    flat = {name: torch.as_tensor(value) for name, value in _leaves(optimizer.state_dict()["state"])}
    first = {tensor.data_ptr(): name for name, tensor in reversed(flat.items())}
    return {name: tensor if first[tensor.data_ptr()] == name else tensor.clone() for name, tensor in flat.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give back to a new optimizer what `optimizer_state` took from one over the same parameters."""
    state: dict[Any, Any] = {}
    for key, value in tensors.items():
        index, *within, name = key.split(".")
        place = state.setdefault(int(index), {})
        for each in within:
            place = place.setdefault(each, {})
        whole = value.dim() == 0 and value.dtype == torch.int64
        place[name] = int(value) if whole else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _leaves(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is no mapping in nested mappings, under its keys with dots between them: bitsandbytes nests its moments."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
