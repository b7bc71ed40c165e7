"""What training reads: latents and what the UNet is told of them, from rows that are in memory or in cached files.

Flows in: tables of rows.  Flows out: the `Batch` of a step, a function of (seed, step, row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..randomness import generator
from .order import Group, Order

Shard = Mapping[str, Tensor]
"""Tensors of as many rows.  Of pictures: `mean` and, unless it is zero everywhere, `std` of the scaled latent,
[n, 4, h, w], and `time_ids` [n, 6].  Of captions: `context` [n, 77, D] and, for SDXL, `pooled` [n, P]."""


class Batch(NamedTuple):
    """What one training step sees."""

    latents: Tensor
    """[B, 4, h, w] float32, scaled, drawn from the VAE's posterior."""
    cond: Conditioning
    """The captions, B rows."""
    uncond: Conditioning
    """The empty caption, B rows, with the time_ids of the pictures."""


@dataclass(frozen=True)
class Table:
    """The pictures of one group: where each and its caption are."""

    index: Tensor
    """[n, 4] int32: shard and row in `latents`, shard and row in `captions`."""
    latents: Sequence[Shard]
    captions: Sequence[Shard]


@dataclass(frozen=True)
class Dataset:
    """Captioned latents, in groups of one bucket each."""

    groups: tuple[Group, ...]
    tables: Sequence[Table]
    """As many as groups."""
    empty: Conditioning
    """The empty caption, one row."""

    def __len__(self) -> int:
        """How many pictures the first epoch shows."""
        return sum(group.shown(1) for group in self.groups)

    def batch(self, step: int, size: int, part: slice = slice(None), *, seed: int, caption_dropout: float) -> Batch:
        """The rows `part` of the `size` rows of a step, all of one bucket.

        Which pictures they are, which captions are dropped and the posterior's noise are functions of (seed, step,
        row): however the rows of a step are divided among processes, together they are the same.
        """
        rows = _order(self.groups, size, seed).rows(step)[part].tolist()
        dropped = torch.rand(size, generator=generator(seed, "caption dropout", step))[part] < caption_dropout
        numbers = range(size)[part]
        latents, time_ids, captions = [], [], []
        for number, (group, picture), drop in zip(numbers, rows, dropped.tolist(), strict=True):
            table = self.tables[group]
            shard, row, caption_shard, caption = table.index[picture].tolist()
            latents.append(_draw(table.latents[shard], row, generator(seed, f"posterior of row {number}", step)))
            time_ids.append(table.latents[shard]["time_ids"][row])
            captions.append(self.empty if drop else caption_of(table.captions[caption_shard], caption))
        cond, ids = Conditioning.cat(captions), torch.stack(time_ids).float()
        return Batch(torch.stack(latents), told(cond, ids), told(self.empty.expand(len(rows)), ids))


def caption_of(shard: Shard, row: int) -> Conditioning:
    """The embedding of one caption, one row of float32."""
    pooled = shard["pooled"][row : row + 1].float() if "pooled" in shard else None
    return Conditioning(shard["context"][row : row + 1].float(), pooled)


def _draw(shard: Shard, row: int, draw: torch.Generator) -> Tensor:
    mean = shard["mean"][row].float()
    return mean + shard["std"][row].float() * torch.randn(mean.shape, generator=draw) if "std" in shard else mean


def told(captions: Conditioning, time_ids: Tensor) -> Conditioning:
    """Captions with their pictures' time_ids [B, 6], if the model is told of them, which is if it is told `pooled`."""
    return captions if captions.pooled is None else Conditioning(captions.context, captions.pooled, time_ids)


@lru_cache(maxsize=4)
def _order(groups: tuple[Group, ...], size: int, seed: int) -> Order:
    return Order(groups, size, seed)
