"""What training reads: latents and their captions' conditioning, from rows in memory or in cached files.

The batch of a step is a function of (seed, step, row), so there is no position in the data to save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..randomness import generator
from .order import Group, Order
from .store import DIGESTS

Shard = Mapping[str, Tensor]
"""Tensors with one row to each picture or caption.  Pictures: `mean` and, unless it is zero everywhere, `std` of the
normalized latent, [n, C, ...], and `sizes` [n, 6].  Captions: the model's conditioning by name, [n, ...] each."""

Join = Callable[[Sequence[Conditioning], Tensor], Conditioning]
"""(a row for each picture, its sizes [B, 6]) -> B rows, as the model's `Checkpoint.collate`."""


class Batch(NamedTuple):
    """What one training step sees."""

    latents: Tensor
    """[B, C, ...] float32, normalized, drawn from the autoencoder's posterior."""
    cond: Conditioning
    """The captions, B rows."""
    uncond: Conditioning
    """The empty caption, B rows, with the sizes of the pictures."""


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
    join: Join

    def __len__(self) -> int:
        """How many pictures the first epoch shows."""
        return sum(group.shown(1) for group in self.groups)

    def batch(self, step: int, size: int, part: slice = slice(None), *, seed: int, caption_dropout: float) -> Batch:
        """The rows `part` of the `size` rows of a step, all of one bucket.

        Which pictures they are, which captions are dropped and the posterior's noise are functions of (seed, step,
        row), so dividing the rows of a step among processes changes none of them.
        """
        rows = _order(self.groups, size, seed).rows(step)[part].tolist()
        dropped = torch.rand(size, generator=generator(seed, "caption dropout", step))[part] < caption_dropout
        numbers = range(size)[part]
        latents, sizes, captions = [], [], []
        for number, (group, picture), drop in zip(numbers, rows, dropped.tolist(), strict=True):
            table = self.tables[group]
            shard, row, caption_shard, caption = table.index[picture].tolist()
            latents.append(_draw(table.latents[shard], row, generator(seed, f"posterior of row {number}", step)))
            sizes.append(table.latents[shard]["sizes"][row])
            captions.append(self.empty if drop else caption_of(table.captions[caption_shard], caption))
        together = torch.stack(sizes)
        uncond = self.join([self.empty] * len(rows), together)
        return Batch(torch.stack(latents), self.join(captions, together), uncond)


def caption_of(shard: Shard, row: int) -> Conditioning:
    """The conditioning of one caption, one row; floating-point tensors as float32."""
    rows = {name: tensor[row : row + 1] for name, tensor in shard.items() if name != DIGESTS}
    return Conditioning({name: row.float() if row.is_floating_point() else row for name, row in rows.items()})


def _draw(shard: Shard, row: int, draw: torch.Generator) -> Tensor:
    mean = shard["mean"][row].float()
    return mean + shard["std"][row].float() * torch.randn(mean.shape, generator=draw) if "std" in shard else mean


@lru_cache(maxsize=4)
def _order(groups: tuple[Group, ...], size: int, seed: int) -> Order:
    return Order(groups, size, seed)
