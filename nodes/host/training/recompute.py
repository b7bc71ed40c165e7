"""Gradient checkpointing for networks that work in place: blocks are run again, on copies, in the backward pass.

Many of the host's networks write over tensors: a block adds to its input, `x += gate * f(norm(x))`. Then
torch.utils.checkpoint gives wrong gradients without an error, because a block that is run again starts from an input
that the first run has changed. Here each run has its own copies of the block's inputs. Within the block, a tensor that
is saved for the backward pass is copied before it is written over.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ....tcd import Adapter
from .kernels import differentiable_kernels
from .saved_tensors import SavedTensors

_Rebuild = Callable[[Sequence[Tensor]], Any]
"""Puts tensors back into the structure from which `_flatten` took them."""


@contextmanager
def recomputing(adapter: Adapter) -> Iterator[None]:
    """Within the block, keep only the inputs of each block of the adapter's network, and recompute the rest.

    The backward pass runs each block again with the adapter in the state of the forward pass, and must be within the
    `with` block too. It must be started by `backward()`: torch.autograd.grad does not see the adapter's weights. The
    blocks must draw no random numbers. Raises ValueError if something else has replaced the `forward` of a block.
    """
    replaced = []
    try:
        for block in blocks(adapter.network):
            if "forward" in vars(block):
                raise ValueError(f"the block {type(block).__name__} has a replaced forward already: remove that first")
            block.forward = _RecomputedForward(block, adapter)  # as in tcd/adapter.py, state_dict and hooks see nothing
            replaced.append(block)
        yield
    finally:
        for block in replaced:
            del block.forward


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: the members of its outermost ModuleLists.

    In place of a member that only holds others, such as a Sequential, its members are returned. Single layers are left
    out: they would save no memory, and the adapter replaces their `forward`.
    """
    found: dict[nn.Module, None] = {}
    for child in network.children():
        members = _members(child) if isinstance(child, nn.ModuleList) else blocks(child)
        found |= dict.fromkeys(members)
    return list(found)


def _members(container: nn.Module) -> list[nn.Module]:
    found = []
    for child in container.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += _members(child)
        elif next(child.children(), None) is not None:
            found.append(child)
    return found


class _RecomputedForward:
    """Replaces the `forward` of one block."""

    def __init__(self, block: nn.Module, adapter: Adapter) -> None:
        self.block, self.adapter, self.saved = ref(block), adapter, SavedTensors()
        # Because of it, the output of a block has a gradient if only the adapter's weights in it need one.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block: Any = self.block()
        if not torch.is_grad_enabled():
            return type(block).forward(block, *args, **kwargs)
        leaves: list[Tensor] = []
        rebuild, outputs = _flatten((args, kwargs), leaves), _Outputs()

        def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            args, kwargs = rebuild([tensor.clone() for tensor in tensors])
            return outputs.take(type(block).forward(block, *args, **kwargs))

        results = _Recomputed.apply(run, self.saved, self.adapter, self.anchor, *leaves)
        return outputs.rebuild(results)


class _Outputs:
    """The structure of a block's output, from its first run."""

    rebuild: _Rebuild

    def take(self, output: Any) -> tuple[Tensor, ...]:
        leaves: list[Tensor] = []
        self.rebuild = _flatten(output, leaves)
        return tuple(leaves)


class _Recomputed(torch.autograd.Function):
    """Runs a block without a graph, and again with one in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, saved: SavedTensors, adapter: Adapter, _anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.saved, ctx.adapter, ctx.state = run, saved, adapter, adapter.state
        ctx.save_for_backward(*inputs)  # and so torch raises an error if the network writes over one of them later
        outputs: tuple[Tensor, ...] = run(inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        inputs = [
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with differentiable_kernels(), ctx.adapter.using(ctx.state):
            with torch.enable_grad():
                outputs = ctx.saved.run(partial(ctx.run, inputs))
            pairs = [(y, gradient) for y, gradient in zip(outputs, gradients, strict=True) if y.requires_grad]
            # It also adds to the gradients of the adapter's weights.
            torch.autograd.backward([y for y, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, None, *(tensor.grad for tensor in inputs))


def _flatten(value: Any, leaves: list[Tensor]) -> _Rebuild:
    """Append the tensors in lists, tuples, dicts and dataclasses to `leaves`; return what puts others in their place.

    The containers are built anew each time, so a later run sees them as they are now.
    """
    if isinstance(value, Tensor):
        place = len(leaves)
        leaves.append(value)
        return lambda tensors: tensors[place]
    if isinstance(value, dict):
        entries = {name: _flatten(each, leaves) for name, each in value.items()}
        return lambda tensors: {name: rebuild(tensors) for name, rebuild in entries.items()}
    if isinstance(value, list | tuple):
        parts, kind = [_flatten(each, leaves) for each in value], type(value)
        make = getattr(kind, "_make", kind)  # of a NamedTuple
        return lambda tensors: make([rebuild(tensors) for rebuild in parts])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _flatten(getattr(value, field.name), leaves) for field in dataclasses.fields(value)}
        instance = value
        return lambda tensors: dataclasses.replace(
            instance, **{name: rebuild(tensors) for name, rebuild in fields.items()}
        )
    return lambda tensors: value
