"""Gradients through the host's fused functions, which have no backward pass of their own."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

_FUSED = ("adaln", "apply_rope", "rms_")  # normalization and rotary embeddings; quantised layers have a backward pass


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Let gradients pass through every layer of the host's models within the block, and restore the host after it.

    The host's flag `in_training` is set. Models then choose operations that have gradients, and call a quantised Linear
    as a module, so that a LoRA beside it is used. Not every model asks for the flag, so the fused functions of
    comfy_kitchen are replaced too: where an input needs a gradient, by their versions in plain torch. A host without
    the flag, or without comfy_kitchen, has nothing to change.
    """
    with ExitStack() as stack:
        if hasattr(comfy.model_management, "in_training"):
            stack.enter_context(_replaced(comfy.model_management, "in_training", True))
        kitchen, eager = _kitchen()
        for name, in_torch in eager.items():
            stack.enter_context(_replaced(kitchen, name, partial(_choose, getattr(kitchen, name), in_torch)))
        yield


def _choose(fused: Callable[..., Any], in_torch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return (in_torch if needs_gradient else fused)(*args, **kwargs)


@cache
def _kitchen() -> tuple[Any, dict[str, Callable[..., Any]]]:
    """Return comfy_kitchen, and its fused functions in plain torch by name.

    Those that end in _ work in place: they refuse tensors that need a gradient, and the host calls them only where
    `in_training` is not set.
    """
    try:
        kitchen = importlib.import_module("comfy_kitchen")
        eager = importlib.import_module("comfy_kitchen.backends.eager")
    except ModuleNotFoundError:
        return None, {}
    names = [name for name in eager.__all__ if name.startswith(_FUSED) and not name.endswith("_")]
    return kitchen, {name: getattr(eager, name) for name in names if hasattr(kitchen, name)}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
