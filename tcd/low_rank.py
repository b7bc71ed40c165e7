"""The term up(scale down(x)) of a LoRA (arXiv 2106.09685), alone, and added to the output of a frozen Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


def low_rank(x: Tensor, down: Tensor, up: Tensor, scale: float, layer: Any) -> Tensor:
    """Return up(scale down(x)) for a Linear or convolution `layer`.

    down: [rank, in] for a Linear, [rank, in, *kernel] for a convolution. up: [out, rank] or [out, rank, 1, ...]. Both
    have the dtype of x. A convolution takes stride, padding and dilation from `layer`.
    """
    # The scale multiplies the smallest of the three tensors: on a GPU this takes as long as reading and writing it.
    if down.ndim == 2:
        return functional.linear(functional.linear(x, down) * scale, up)
    convolve = _CONVOLUTIONS[down.ndim]
    term: Tensor = convolve(convolve(x, down, None, layer.stride, layer.padding, layer.dilation) * scale, up)
    return term


def is_frozen_linear(layer: nn.Module) -> bool:
    """Return whether `linear_with_low_rank` computes what the layer does: it is a torch Linear without gradients."""
    return type(layer) is nn.Linear and not any(parameter.requires_grad for parameter in layer.parameters())


def linear_with_low_rank(x: Tensor, layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return layer(x) + up(scale down(x)), without a gradient for the layer's own weights; arguments as in `low_rank`.

    Where two products are summed, here and in the gradient of x, the second product adds to the first. On a GPU a sum
    of its own would take longer than the product before it, which has few operations for each number read and written.
    """
    total: Tensor = _LinearWithLowRank.apply(x, layer.weight, layer.bias, down, up, scale)  # type: ignore[no-untyped-call]
    return total


class _LinearWithLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = (rows @ down.t()).mul_(scale)
        ctx.save_for_backward(x, weight, down, up, hidden)
        ctx.scale = scale
        return functional.linear(rows, weight, bias).addmm_(hidden, up.t()).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        rows, of_y = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_hidden = (of_y @ up).mul_(ctx.scale)
        of_x = (of_y @ weight).addmm_(of_hidden, down).view_as(x) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_hidden.t() @ rows, of_y.t() @ hidden, None
