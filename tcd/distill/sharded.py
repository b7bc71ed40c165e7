"""Whether FSDP has sharded a network, so that all processes must call it the same number of times."""

from __future__ import annotations

from torch import nn


def is_sharded(network: nn.Module) -> bool:
    """Return whether fully_shard was applied to the network; it replaces the class by one of FSDP's."""
    # By name, because not every build of torch has torch.distributed.
    return any(kind.__name__ == "FSDPModule" for kind in type(network).__mro__)
