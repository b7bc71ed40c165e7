"""What the UNet is told besides the noisy latent and the time, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides x_t and t: B rows of text embeddings and, for SDXL, of what goes with them."""

    context: Tensor
    """[B, 77, D], what the UNet attends to."""
    pooled: Tensor | None = None
    """[B, P], the whole caption as one vector; SDXL alone."""
    time_ids: Tensor | None = None
    """[B, 6] float32: original height and width, crop top and left, target height and width, in pixels; SDXL alone."""

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def expand(self, count: int) -> Conditioning:
        """The same with its one row repeated to `count` rows, without copies; as it is when it has that many.

        Raises RuntimeError for any other number of rows.
        """
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of `parts`, one after the other.

        Raises ValueError when some of them have what others lack.
        """
        contexts, pooled, time_ids = zip(*((part.context, part.pooled, part.time_ids) for part in parts), strict=True)
        return Conditioning(torch.cat(contexts), _cat(pooled, "pooled"), _cat(time_ids, "time_ids"))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, time_ids = (None if each is None else change(each) for each in (self.pooled, self.time_ids))
        return Conditioning(change(self.context), pooled, time_ids)


def _cat(tensors: Sequence[Tensor | None], name: str) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) not in (0, len(tensors)):
        raise ValueError(f"{len(given)} of {len(tensors)} conditionings have {name}: give it to all of them or to none")
    return torch.cat(given) if given else None
