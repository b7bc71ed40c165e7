"""Which Linear of the host computes as a plain one."""

import comfy.ops
from torch import nn

from ....tcd.low_rank import has_gradient

_PLAIN = (comfy.ops.disable_weight_init.Linear, comfy.ops.manual_cast.Linear)


def is_frozen_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes what a torch Linear does whose weights are frozen and have the dtype of x.

    The host's own Linear does, also if it casts its weights in each call, such as those of a plain float8 file. It does
    not if the host changes its weights in each call, or may move them out of memory (dynamic VRAM, attribute _v).
    """
    if type(layer) not in _PLAIN or type(layer.weight) is not nn.Parameter or hasattr(layer, "_v"):
        return False
    return not (layer.weight_function or layer.bias_function or has_gradient(layer))
