"""Lets ComfyUI's code run on the meta device, where it may read a number to decide what to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ReadAsOne(TorchDispatchMode):
    """Within the block, numbers that are read from the meta device are 1, such as whether a mask is all ones."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return 1
        return function(*arguments, **(options or {}))
