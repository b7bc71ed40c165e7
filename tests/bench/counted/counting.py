"""Counts what the operations within a block compute, read and write, on the meta device: no number is computed.

Attention is counted as one fused operation, as it is on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flops  # noqa: F401, adds a formula to the registry
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


@dataclass
class Work:
    """The work of some operations."""

    kernels: int = 0
    """Operations that compute or copy; on a GPU each is a kernel or more."""
    flops: int = 0
    moved: int = 0
    """Bytes read and written, each tensor once for each operation."""
    seconds: float = 0.0
    """The least time: for each operation, the longer of its computing and its reading and writing."""

    def add(self, other: Work) -> None:
        """Add other work to this."""
        self.kernels += other.kernels
        self.flops += other.flops
        self.moved += other.moved
        self.seconds += other.seconds


class Card(NamedTuple):
    """A GPU's published rates."""

    flops: float
    """A second, of dense products in bfloat16."""
    bandwidth: float
    """Bytes a second."""


H100 = Card(989e12, 3.35e12)
"""In the variant SXM."""


@dataclass
class Counted:
    """Work by part of a step and by operation."""

    part: str = ""
    work: dict[tuple[str, str], Work] = field(default_factory=lambda: defaultdict(Work))

    def of(self, part: str | None = None, *, products: bool | None = None) -> Work:
        """Return the work of a part or of all parts; products: of matrix products alone, or of all others."""
        total = Work()
        for (each, name), work in self.work.items():
            if part in (None, each) and products in (None, name in PRODUCTS):
                total.add(work)
        return total

    def by_operation(self) -> dict[str, Work]:
        """Return the work of each operation, the longest first."""
        totals: dict[str, Work] = defaultdict(Work)
        for (_, name), work in self.work.items():
            totals[name].add(work)
        return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


@contextmanager
def counting() -> Iterator[Counted]:
    """Count the operations within the block; set `part` of the result to name what comes next."""
    result = Counted()
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: attention(query, key, value)[0]
    try:
        with _Counting(result):
            yield result
    finally:
        functional.scaled_dot_product_attention = original


class _Counting(TorchDispatchMode):
    def __init__(self, result: Counted) -> None:
        super().__init__()
        self.result = result

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        output = function(*arguments, **(options or {}))
        packet = function._overloadpacket
        inputs, outputs = (_by_storage(value) for value in ((arguments, options), output))
        writes = function._schema.is_mutable or any(key not in inputs for key in outputs)  # otherwise a view
        if writes and outputs and packet not in ALLOCATIONS:
            formula = flop_registry.get(packet)
            flops = formula(*arguments, **(options or {}), out_val=output) if formula else 0
            moved = sum(map(_bytes, (*inputs.values(), *outputs.values())))
            seconds = max(flops / H100.flops, moved / H100.bandwidth)
            self.result.work[self.result.part, packet.__name__].add(Work(1, flops, moved, seconds))
        return output


def _by_storage(value: Any) -> dict[int, Tensor]:
    """Return the tensors on the meta device in nested values, one for each storage."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_meta)
    return {tensor.untyped_storage()._cdata: tensor for tensor in tensors}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@torch.library.custom_op("counted::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of attention, and the numbers that a fused kernel saves for the gradient; meta device only."""
    raise NotImplementedError


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Strided so that the reshape after the attention needs no copy.
    output = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("counted::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of attention's inputs."""
    raise NotImplementedError


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


attention.register_autograd(
    lambda ctx, gradient, _: attention_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@register_flop_formula(torch.ops.counted.attention)
def _attention_flops(query: Any, key: Any, value: Any, *, out_shape: Any = None) -> int:
    """Two products of queries, keys and the width of a head."""
    return 4 * _numel(query) * int(key[-2])


def _numel(shape: Any) -> int:
    return int(torch.Size(shape).numel())


@register_flop_formula(torch.ops.counted.attention_backward)
def _attention_backward_flops(gradient: Any, query: Any, key: Any, *_: Any, out_shape: Any = None) -> int:
    """Four such products; the fifth of a fused kernel, which computes the attention again, does not count as work."""
    return 8 * _numel(query) * int(key[-2])


PRODUCTS = {packet.__name__ for packet in flop_registry}
