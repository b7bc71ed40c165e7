"""Add LoRA beside quantised weights: layer(x) + strength * alpha / rank * up(down(x)), with the weight unchanged.

The host's own way is to add the product to the weight, and to round the sum to the weight's few bits. That loses much
of a LoRA: the output is several percent off for 8 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor
from torch.nn import functional

from ...tcd.adapter import layer_shape
from ...tcd.low_rank import low_rank
from .layer_terms import NETWORK, ModelCall, add_term
from .time_layer import is_linear

try:
    from comfy.quant_ops import QuantizedTensor
except ImportError:  # an older host, whose quantised weights are tensors with a float8 dtype
    QuantizedTensor = ()

_KEY = "tcd_lora_beside"
_MAX_LISTED = 3  # number of layers that the log lists
_WHY_ROUNDED = (
    "There it is added to the quantised weight and rounded with it, because the weight has 8-bit integers, which the "
    "host may use without its layer, or because it is no plain LoRA but, for example, a DoRA"
)
_log = logging.getLogger("trajectory-consistency")


def is_quantized(weight: Tensor) -> bool:
    """Return whether a sum with the weight would be rounded to 8 bits or fewer."""
    return isinstance(weight, QuantizedTensor) or (weight.is_floating_point() and weight.element_size() == 1)


def add_beside(
    model: Any,
    file: str,
    patches: Mapping[Any, Any],
    weights: Mapping[str, Tensor],
    strength: float,
    *,
    everywhere: bool = False,
) -> dict[Any, Any]:
    """Add the LoRA of quantised weights, or everywhere that of all weights, beside them, and return the other patches.

    model: a clone, changed in place. file: the LoRA's name. patches: by the patcher's key, as the host's load_lora
    returns them. weights: the model's, by name. A LoRA that depends on the weight (DoRA), or whose layer the host may
    not call, stays a patch; a warning counts and names these.
    """
    left: dict[Any, Any] = {}
    rounded: list[str] = []
    terms: list[_LoraTerm] = []
    for key, patch in patches.items():
        name, *more = (key,) if isinstance(key, str) else key
        path = name.removeprefix(f"{NETWORK}.").removesuffix(".weight")
        if not (everywhere or is_quantized(weights[name])):
            left[key] = patch
        elif not (_is_plain(patch) and _can_stand_beside(getattr(model.model, NETWORK).get_submodule(path), more)):
            left[key] = patch
            rounded.append(path)
        else:
            terms.append(_LoraTerm(patch, weights[name].shape, strength, *more))
            add_term(model, path, terms[-1])
    if terms:
        model.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, lambda _: _free(terms))
    if rounded:
        listed = ", ".join(rounded[:_MAX_LISTED]) + (" ..." if len(rounded) > _MAX_LISTED else "")
        _log.warning("%s is rounded in %d of its layers: %s. %s", file, len(rounded), listed, _WHY_ROUNDED)
    return left


def _free(terms: Iterable[_LoraTerm]) -> None:
    for term in terms:
        term.free()


def _is_plain(patch: Any) -> bool:
    """Whether a patch is a plain LoRA: no DoRA, no core, and no difference of a weight or a bias."""
    return getattr(patch, "name", None) == "lora" and not any(part is not None for part in patch.weights[3:])


def _can_stand_beside(layer: Any, more: list[Any]) -> bool:
    """more: what the patcher's key has besides the name: nothing, a slice, or a slice and a function of the weight."""
    is_rows = len(more) == 1 and more[0][0] == 0
    fits = (is_rows and is_linear(layer)) if more else layer_shape(layer) is not None
    return fits and not _may_be_read_directly(layer)


def _may_be_read_directly(layer: Any) -> bool:
    """Return whether the host may compute with the weight without calling the layer.

    comfy.ops.linear_input_act does so with 8-bit integers, for an MLP's second Linear in Wan, LTX and others, but not
    while a model is trained.
    """
    in_training = getattr(comfy.model_management, "in_training", False)
    return not in_training and getattr(layer.weight, "_layout_cls", None) == "TensorWiseINT8Layout"


class _LoraTerm:
    """The term of one LoRA; a copy of its weights is kept on each device until the end of the run."""

    def __init__(
        self, patch: Any, shape: torch.Size, strength: float, rows: tuple[int, int, int] | None = None
    ) -> None:
        """patch: the host's LoRA. shape: the weight's. rows: (0, start, length) of the outputs, if not all of them."""
        up, down, alpha = patch.weights[:3]
        rank, kernel = len(down), shape[2:]
        self._up = up.reshape(len(up), rank, *(1 for _ in kernel))
        self._down = down.reshape(rank, -1, *kernel)
        self._scale = strength * (1.0 if alpha is None else float(alpha) / rank)
        _, start, length = rows or (0, 0, shape[0])
        self._padding = (start, shape[0] - start - length)
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, call: ModelCall, layer: Any, x: Tensor) -> Tensor:
        """Return the term for x [..., in], or [B, in, ...] for a convolution."""
        down, up = self._on(x.device, x.dtype)
        term = low_rank(x, down, up, self._scale, layer)
        return functional.pad(term, self._padding) if any(self._padding) else term

    def free(self) -> None:
        """Drop the copies."""
        self._copies = {}

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        copies = self._copies
        if (device, dtype) not in copies:
            copies[device, dtype] = self._down.to(device, dtype), self._up.to(device, dtype)
        return copies[device, dtype]
