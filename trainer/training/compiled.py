"""The network through `torch.compile`."""

from __future__ import annotations

import torch
from torch import nn

# Graphs of one function, beyond which torch would go on without compiling: one for each state of the adapter that is
# used, with and without gradient, for each size of picture and number of rows.
_GRAPHS = 64


def compile_network(network: nn.Module, backend: str = "inductor") -> None:
    """Compile `network` in place, under its own parameter names.

    It is compiled again when its adapter is in a state for the first time, since torch guards the switch; later it
    finds that state's graph again.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    network.compile(backend=backend)
