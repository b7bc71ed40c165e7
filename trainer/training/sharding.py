"""FSDP: shard the frozen base over the processes, if one GPU has too little memory for all of it."""

from __future__ import annotations

import os

from ..models.seam import Model
from .processes import Processes


def fsdp_requested() -> bool:
    """Whether `accelerate launch` was configured with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard(model: Model, processes: Processes) -> None:
    """Shard the network's frozen weights over the processes; each block's weights are gathered while it computes.

    The adapter is not part of the network, and stays complete in every process. From now on, all processes must call
    the network the same number of times.
    """
    # Imported here because not every build of torch has torch.distributed.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes.barrier()  # one may have loaded the base much sooner
    mesh = init_device_mesh(model.device.type, (processes.count,))
    for module in (*model.blocks(), model.network):
        fully_shard(module, mesh=mesh)
