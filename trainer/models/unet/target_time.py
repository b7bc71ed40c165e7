"""The UNet told the target time (TCF(S+) of arXiv 2402.19159), by an embedding of it to each adapter.

Flows in: a UNet.  Flows out: the same, which adds to its embedding of t that of s, where diffusers has class labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ....tcd import TargetInput, TargetTime


class TargetTimes(nn.ModuleDict):
    """Embeddings of the target time, by the names of the adapters that they belong to, of which one is in use."""

    used = ""
    alone = False
    """Whether they are trained while the LoRA stays as it is."""

    def forward(self, times: Tensor) -> Tensor:
        """Embed (t, s), timesteps [B, 2], as [B, width]; of an adapter that is not told, a zero to add: [1]."""
        if self.used not in self:
            return times.new_zeros(1, dtype=torch.float32)
        embedded: Tensor = self[self.used](*times.unbind(-1))
        return embedded


def new_embedding(unet: UNet2DConditionModel, told: TargetInput, seed: int) -> TargetTime:
    """An embedding for a UNet that changes nothing yet."""
    first = unet.time_embedding.linear_1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torch initializes layers from the global generator
        return TargetTime(first.in_features, first.out_features, target_input=told)


def put(unet: UNet2DConditionModel, name: str, embedding: TargetTime) -> None:
    """Give a UNet the embedding of the adapter `name`."""
    if unet.class_embedding is None:
        unet.class_embedding = TargetTimes()
    unet.class_embedding[name] = embedding.to(unet.conv_in.weight.device)


def take(unet: UNet2DConditionModel, name: str) -> None:
    """Take away from a UNet the embedding of the adapter `name`, if it has one."""
    embeddings = unet.class_embedding
    if embeddings is not None and name in embeddings:
        del embeddings[name]
        if not embeddings:
            unet.class_embedding = None


def use(unet: UNet2DConditionModel, name: str) -> None:
    """Have the UNet told of the target time by the embedding of the adapter `name`, if it is told at all."""
    if unet.class_embedding is not None:
        unet.class_embedding.used = name


def embedding_of(unet: UNet2DConditionModel, name: str) -> TargetTime | None:
    """The embedding of the adapter `name`, if it has one."""
    embeddings = unet.class_embedding
    return None if embeddings is None or name not in embeddings else embeddings[name]


@contextmanager
def not_told(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the block the UNet is told nothing of the target time, and is again after it."""
    embeddings, unet.class_embedding = unet.class_embedding, None
    try:
        yield
    finally:
        unet.class_embedding = embeddings
