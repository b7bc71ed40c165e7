"""The pictures of each training step, as a function of (seed, step), so that no position in the data has to be saved.

All pictures of a step are of one bucket.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from ..randomness import generator


class Group(NamedTuple):
    """The pictures of one source and bucket."""

    bucket: tuple[int, ...]
    """Height and width; the node adds what else must be equal in a batch."""
    pictures: int
    """Number of pictures."""
    repeats: float | Fraction
    """How often an epoch shows each picture, on average if it is a fraction."""
    phase: float | Fraction = 0
    """Fraction of a picture, below 1, that is added before the number of pictures is rounded down."""

    def shown(self, epochs: int) -> int:
        """Return how many pictures of the group the first `epochs` epochs show in total."""
        return floor(self.pictures * self.repeats * epochs + self.phase)


@dataclass
class BatchOrder:
    """An endless sequence of epochs, each of which shows every picture `repeats` times, in batches of one bucket.

    The pictures of a group are shuffled in one pass after another, and each epoch takes the next `pictures * repeats`
    of this sequence.  Within an epoch, the pictures of each bucket are shuffled and split into batches; an incomplete
    last batch is completed with pictures from the first.  Then the batches of all buckets are shuffled.
    """

    groups: tuple[Group, ...]
    size: int
    """Number of rows in a batch."""
    seed: int
    _starts: list[int] = field(default_factory=lambda: [0])
    """First step of each epoch, computed as far as needed so far."""

    def rows(self, step: int) -> Tensor:
        """Return the rows of a step, [size, 2] int64: index of the group, and of the picture in the group."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps(len(self._starts) - 1))
        number = bisect_right(self._starts, step) - 1
        epoch = _epoch(self.groups, self.size, self.seed, number)
        bucket, k = epoch.batches[step - self._starts[number]].tolist()
        rows = epoch.rows[bucket]
        return rows[(k * self.size + torch.arange(self.size)) % len(rows)].long()

    def steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        shown: dict[tuple[int, ...], int] = defaultdict(int)
        for group in self.groups:
            shown[group.bucket] += group.shown(epoch + 1) - group.shown(epoch)
        return sum(-(-rows // self.size) for rows in shown.values())


def dropped_captions(size: int, share: float, *, seed: int, step: int) -> Tensor:
    """Return which rows of a step get the empty caption, bool [size]: on average this share of them."""
    return torch.rand(size, generator=generator(seed, "caption dropout", step)) < share


class _Epoch(NamedTuple):
    rows: list[Tensor]
    """For each bucket, its shuffled pictures, [n, 2] int32: index of the group, and of the picture in the group."""
    batches: Tensor
    """[steps, 2]: index of the bucket in `rows`, and of the batch in the bucket."""


@lru_cache(maxsize=2)
def _epoch(groups: tuple[Group, ...], size: int, seed: int, number: int) -> _Epoch:
    parts: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for which, group in enumerate(groups):
        pictures = _epoch_pictures(group, which, seed, number)
        if len(pictures):
            parts[group.bucket].append(torch.stack([torch.full_like(pictures, which), pictures], 1))
    draw = generator(seed, "epoch", number)
    joined = [torch.cat(parts[bucket]) for bucket in sorted(parts)]
    rows = [each[torch.randperm(len(each), generator=draw)] for each in joined]
    batches = [torch.cartesian_prod(torch.tensor([b]), torch.arange(-(-len(r) // size))) for b, r in enumerate(rows)]
    steps = sum(map(len, batches))
    return _Epoch(rows, torch.cat(batches)[torch.randperm(steps, generator=draw)])


def _epoch_pictures(group: Group, which: int, seed: int, epoch: int) -> Tensor:
    """Return the indices of the pictures of group number `which` that an epoch shows, [n] int32."""
    start, end, n = group.shown(epoch), group.shown(epoch + 1), group.pictures
    passes = [
        torch.randperm(n, generator=generator(seed, f"pass {each} of group", which), dtype=torch.int32)
        for each in range(start // n, -(-end // n))
    ]
    return torch.cat(passes)[start % n : start % n + end - start] if passes else torch.empty(0, dtype=torch.int32)
