"""Conditioning: the network's inputs other than the noisy latent and the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named tensors [B, ...] with one row per example; each model defines the names that it uses.

    If rows are padded, the mask is one of these tensors, so it is selected, moved and repeated together with them.
    """

    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(**tensors: Tensor | None) -> Conditioning:
        """Create conditioning from named tensors, leaving out those that are None."""
        return Conditioning({name: tensor for name, tensor in tensors.items() if tensor is not None})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the conditioning on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def expand(self, count: int) -> Conditioning:
        """Return a single row repeated to `count` rows, without a copy; unchanged if there are `count` rows already.

        Raises RuntimeError for any other number of rows.
        """
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of `parts`; `Checkpoint.collate` joins rows of different lengths.

        Raises ValueError if they do not all have the same names and the same row shapes.
        """
        names = {name: [part.tensors[name] for part in parts if name in part.tensors] for name in _names(parts)}
        for name, tensors in names.items():
            if len(tensors) != len(parts):
                raise ValueError(
                    f"{len(tensors)} of {len(parts)} conditionings have {name}: give it to all of them or to none"
                )
            if len({tensor.shape[1:] for tensor in tensors}) > 1:
                shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in tensors)
                raise ValueError(f"rows of {name} have different shapes, {shapes}: join them by their model")
        return Conditioning({name: torch.cat(tensors) for name, tensors in names.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return the conditioning with a function applied to each tensor."""
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()})


def _names(parts: Sequence[Conditioning]) -> dict[str, None]:
    return {name: None for part in parts for name in part.tensors}
