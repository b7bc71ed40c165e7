"""The frozen base spread over the processes (FSDP), where each GPU has too little memory for all of it.

Flows in: a UNet with its adapter, the same in each process.  Flows out: the UNet of which each process keeps a share of
the frozen weights, and gathers a block's from the others whenever it comes to that block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .processes import Processes

_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


def wanted() -> bool:
    """Whether Accelerate was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard(
    unet: UNet2DConditionModel, trained: Sequence[nn.Parameter], device: torch.device, processes: Processes
) -> None:
    """Spread all weights of `unet` but `trained`, which are small and stay whole in each process.

    From here on every process must call the UNet when one does.
    """
    mesh = init_device_mesh(device.type, (processes.count,))
    blocks = [module for module in unet.modules() if isinstance(module, _BLOCKS)]
    for module in (*blocks, unet):
        fully_shard(module, mesh=mesh, ignored_params=set(trained))
