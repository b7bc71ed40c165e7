"""The training data: latents and conditioning, from rows in memory or in cached files.

Each row of a batch is a function of (seed, step, row), so that no position in the data has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...tcd.distill.order import BatchOrder, Group, dropped_captions
from ...tcd.randomness import generator
from ..models.conditioning import Conditioning
from ..models.framing import Framing
from .store import DIGESTS

Shard = Mapping[str, Tensor]
"""Tensors by name, with one row per picture or caption.  Pictures: `mean` and optionally `std` of the normalized
latent, [n, C, ...] each, and `sizes`, the rows [n, 6] of their framing.  Captions: the model's conditioning tensors,
[n, ...] each."""

Join = Callable[[Sequence[Conditioning], Framing], Conditioning]
"""(B captions of one row each, the pictures' framing) -> conditioning of B rows, as `Checkpoint.collate`."""


class Batch(NamedTuple):
    """The pictures and captions of one training step."""

    latents: Tensor
    """[B, C, ...] float32, normalized, sampled from the autoencoder's posterior."""
    cond: Conditioning
    """Conditioning on the captions, B rows."""
    uncond: Conditioning
    """Conditioning on the negative prompt and the pictures' framing, B rows."""


@dataclass(frozen=True)
class Table:
    """The pictures of one group: the location of each latent and caption."""

    index: Tensor
    """[n, 2 + 2 V] int32 for n pictures: shard and row in `latents`, and in `captions` for each of V variants."""
    latents: Sequence[Shard]
    captions: Sequence[Shard]


@dataclass(frozen=True)
class Dataset:
    """Latents with captions, in groups of one source and bucket each."""

    groups: tuple[Group, ...]
    tables: Sequence[Table]
    """The pictures of each group."""
    empty: Conditioning
    """Conditioning on the empty caption, one row."""
    join: Join
    negative: Conditioning | None = None
    """Conditioning on the negative prompt of the teacher's guidance, one row; None for the empty caption."""

    def __len__(self) -> int:
        """Return how many pictures the first epoch shows."""
        return sum(group.shown(1) for group in self.groups)

    def batch(self, step: int, size: int, part: slice = slice(None), *, seed: int, caption_dropout: float) -> Batch:
        """Return the rows `part` of a step's batch of `size` rows. All rows of a step are from one bucket.

        The choice of pictures and of variants of their captions, the dropout and the posterior's noise are functions of
        (seed, step, row), and do not depend on how the rows of a step are divided among processes.
        """
        rows = _order_of(self.groups, size, seed).rows(step)[part].tolist()
        dropped = dropped_captions(size, caption_dropout, seed=seed, step=step)[part]
        chosen = torch.rand(size, generator=generator(seed, "caption variant", step))[part].tolist()
        numbers = range(size)[part]
        latents, framings, captions = [], [], []
        for number, (group, picture), drop, choice in zip(numbers, rows, dropped.tolist(), chosen, strict=True):
            table = self.tables[group]
            shard, row, *variants = table.index[picture].tolist()
            at = 2 * int(choice * (len(variants) // 2))
            caption_shard, caption = variants[at : at + 2]
            latents.append(
                _sample_posterior(table.latents[shard], row, generator(seed, f"posterior of row {number}", step))
            )
            framings.append(table.latents[shard]["sizes"][row])
            captions.append(self.empty if drop else caption_of(table.captions[caption_shard], caption))
        framing = Framing.from_rows(torch.stack(framings))
        uncond = self.join([self.empty if self.negative is None else self.negative] * len(rows), framing)
        return Batch(torch.stack(latents), self.join(captions, framing), uncond)


def caption_of(shard: Shard, row: int) -> Conditioning:
    """Return the conditioning of one caption as one row, with floating-point tensors in float32."""
    rows = {name: tensor[row : row + 1] for name, tensor in shard.items() if name != DIGESTS}
    return Conditioning({name: row.float() if row.is_floating_point() else row for name, row in rows.items()})


def _sample_posterior(shard: Shard, row: int, draw: torch.Generator) -> Tensor:
    """Return mean + std * noise, [C, ...] float32, or the mean if the shard has no std."""
    mean = shard["mean"][row].float()
    return mean + shard["std"][row].float() * torch.randn(mean.shape, generator=draw) if "std" in shard else mean


@lru_cache(maxsize=4)
def _order_of(groups: tuple[Group, ...], size: int, seed: int) -> BatchOrder:
    return BatchOrder(groups, size, seed)
