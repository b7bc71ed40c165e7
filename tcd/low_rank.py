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
    return type(layer) is nn.Linear and not has_gradient(layer)


def has_gradient(layer: Any) -> bool:
    """Return whether the weight or the bias of a Linear gets a gradient."""
    return any(each is not None and each.requires_grad for each in (layer.weight, layer.bias))


def linear_with_low_rank(x: Tensor, layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return layer(x) + up(scale down(x)), without a gradient for the layer's own weights; arguments as in `low_rank`.

    The layer's weights are cast to the dtype of x, again for the gradient, so that no cast weight is kept until then.

    Where two products are summed, here and in the gradient of x, the second product adds to the first. On a GPU a sum
    of its own would take longer than the product before it, which has few operations for each number read and written.
    """
    rows = x.reshape(-1, x.shape[-1])
    total: Tensor = _LinearWithLowRank.apply(rows, layer.weight, layer.bias, down, up, scale)  # type: ignore[no-untyped-call]
    # A view that was made within the function could not be written over afterwards.
    return total.view(*x.shape[:-1], total.shape[-1])


class _LinearWithLowRank(torch.autograd.Function):
    """On matrices: x [rows, in] -> [rows, out]. The scale is a factor of products that are computed anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = x @ down.t()
        # Detached, because torch 2.9 would call no gradient hooks of leaves that are saved where saved_tensors_hooks
        # are in use, as in the recomputed blocks of the host's networks.
        ctx.save_for_backward(x, weight, down.detach(), up.detach(), hidden)
        ctx.scale = scale
        bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, weight.to(x.dtype), bias).addmm_(hidden, up.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        of_hidden, of_x = of_y @ up, None
        if ctx.needs_input_grad[0]:
            of_x = (of_y @ weight.to(x.dtype)).addmm_(of_hidden, down, alpha=ctx.scale)
        of_down = torch.addmm(down, of_hidden.t(), x, beta=0, alpha=ctx.scale)
        of_up = torch.addmm(up, of_y.t(), hidden, beta=0, alpha=ctx.scale)
        return of_x, None, None, of_down, of_up, None
