"""Which pictures a step sees: a function of (seed, step), so that there is no position in the data to save.

Flows in: how many pictures there are of each bucket and source.  Flows out: the rows of a step, all of one bucket.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from ..randomness import generator
from .buckets import Size


class Group(NamedTuple):
    """The pictures that come from one source and have one bucket."""

    bucket: Size
    pictures: int
    repeats: float
    """How often an epoch shows each."""

    def shown(self, epochs: int) -> int:
        """How many of its pictures that many epochs show, together."""
        return floor(self.pictures * self.repeats * epochs)


@dataclass
class Order:
    """An endless row of epochs, each of which shows every picture `repeats` times, in batches of one bucket.

    A group is an endless row of shuffled passes over its pictures, from which each epoch takes the next
    `pictures * repeats`.  What an epoch has of a bucket is shuffled and cut into batches, of which the last is filled
    from the first; then the batches of all buckets are shuffled.
    """

    groups: tuple[Group, ...]
    size: int
    """Rows of a batch."""
    seed: int
    _starts: list[int] = field(default_factory=lambda: [0])
    """The step with which each epoch begins, as far as they were asked for."""

    def rows(self, step: int) -> Tensor:
        """The step's rows, [size, 2] int64: the number of the group, and that of the picture in it."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps(len(self._starts) - 1))
        number = bisect_right(self._starts, step) - 1
        epoch = _epoch(self.groups, self.size, self.seed, number)
        bucket, k = epoch.batches[step - self._starts[number]].tolist()
        rows = epoch.rows[bucket]
        return rows[(k * self.size + torch.arange(self.size)) % len(rows)].long()

    def steps(self, epoch: int) -> int:
        """How many steps an epoch has."""
        shown: dict[Size, int] = defaultdict(int)
        for group in self.groups:
            shown[group.bucket] += group.shown(epoch + 1) - group.shown(epoch)
        return sum(-(-rows // self.size) for rows in shown.values())


class _Epoch(NamedTuple):
    rows: list[Tensor]
    """For each bucket what the epoch shows of it, shuffled, [n, 2] int32: group, and picture in it."""
    batches: Tensor
    """[steps, 2]: the bucket of each, as a number in `rows`, and which of the bucket's batches it is."""


@lru_cache(maxsize=2)
def _epoch(groups: tuple[Group, ...], size: int, seed: int, number: int) -> _Epoch:
    parts: dict[Size, list[Tensor]] = defaultdict(list)
    for which, group in enumerate(groups):
        pictures = _pictures(group, which, seed, number)
        if len(pictures):
            parts[group.bucket].append(torch.stack([torch.full_like(pictures, which), pictures], 1))
    draw = generator(seed, "epoch", number)
    whole = [torch.cat(parts[bucket]) for bucket in sorted(parts)]
    rows = [each[torch.randperm(len(each), generator=draw)] for each in whole]
    batches = [torch.cartesian_prod(torch.tensor([b]), torch.arange(-(-len(r) // size))) for b, r in enumerate(rows)]
    steps = sum(map(len, batches))
    return _Epoch(rows, torch.cat(batches)[torch.randperm(steps, generator=draw)])


def _pictures(group: Group, which: int, seed: int, epoch: int) -> Tensor:
    """The pictures of a group that an epoch shows, int32, each once in every pass over the group."""
    start, end, n = group.shown(epoch), group.shown(epoch + 1), group.pictures
    passes = [
        torch.randperm(n, generator=generator(seed, f"pass {each} of group", which), dtype=torch.int32)
        for each in range(start // n, -(-end // n))
    ]
    return torch.cat(passes)[start % n : start % n + end - start] if passes else torch.empty(0, dtype=torch.int32)
