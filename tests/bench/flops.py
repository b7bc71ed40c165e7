"""FLOPs of operations for which torch has no formula."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.aten.addmm_)
def addmm_flops(total: Any, a: Any, b: Any, *, out_shape: Any = None, **_: Any) -> int:
    """Return the FLOPs of a product [n, k] @ [k, m] that is added to a matrix in place; all are shapes."""
    return 2 * int(a[0]) * int(a[1]) * int(b[1])
