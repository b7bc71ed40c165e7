"""Compile the network with `torch.compile`."""

from __future__ import annotations

import torch
from torch import nn

# After this many graphs of one function, torch stops compiling it. There is one graph for each combination of adapter
# state, with or without gradient, bucket and number of rows.
_MAX_GRAPHS = 64


def compile_network(network: nn.Module, backend: str = "inductor") -> None:
    """Compile `network` in place; its parameters keep their names.

    torch guards on the state of the adapter: the first call in each state compiles a graph, and later calls reuse it.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    network.compile(backend=backend)
