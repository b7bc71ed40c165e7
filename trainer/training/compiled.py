"""The UNet through `torch.compile`."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

# Graphs of one function, beyond which torch would go on without compiling: one for each state of the adapter (trained,
# off, its average, a file's), with and without gradient, for one picture and for any number.
_GRAPHS = 64


def compile_unet(unet: UNet2DConditionModel, backend: str = "inductor") -> None:
    """Compile `unet` in place, under its own parameter names.

    It is compiled anew whenever its adapter is in another state for the first time, as torch guards the flags by which
    adapters are switched; later it finds that state's graph again.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    unet.compile(backend=backend)
