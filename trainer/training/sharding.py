"""The frozen base spread over the processes (FSDP), where each GPU has too little memory for all of it."""

from __future__ import annotations

import os

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..models.seam import Model
from .processes import Processes


def wanted() -> bool:
    """Whether Accelerate was started with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard(model: Model, processes: Processes) -> None:
    """Spread the network's frozen weights; each process keeps a share, and gathers a block's when it comes to it.

    The adapter is beside the network, and stays complete in each process. From here on every process must call the
    network when one does.
    """
    mesh = init_device_mesh(model.device.type, (processes.count,))
    for module in (*model.blocks(), model.network):
        fully_shard(module, mesh=mesh)
