"""Conditioning: the network's inputs other than the noisy latent and the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named tensors [B, ...] with one row per example; each model defines the names that it uses.

    If rows are padded, the mask is one of these tensors, so it is selected, moved and repeated together with them.
    """

    tensors: Mapping[str, Tensor]
    on_cpu: Mapping[str, Tensor] = field(default_factory=dict)
    """Other such tensors, whose numbers the model reads before a call: on a GPU, it would have to wait for them."""

    @staticmethod
    def of(**tensors: Tensor | None) -> Conditioning:
        """Create conditioning from named tensors, leaving out those that are None."""
        return Conditioning({name: tensor for name, tensor in tensors.items() if tensor is not None})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._map_all(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the conditioning on a device; what is in `on_cpu` stays there."""
        return self.map(lambda tensor: tensor.to(device))

    def expand(self, count: int) -> Conditioning:
        """Return a single row repeated to `count` rows, without a copy; unchanged if there are `count` rows already.

        Raises RuntimeError for any other number of rows.
        """
        return self._map_all(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of `parts`; `Checkpoint.collate` joins rows of different lengths.

        Raises ValueError if they do not all have the same names and the same row shapes.
        """
        return Conditioning(_cat([part.tensors for part in parts]), _cat([part.on_cpu for part in parts]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return the conditioning with a function applied to each tensor but those in `on_cpu`."""
        return Conditioning(_mapped(self.tensors, change), self.on_cpu)

    def _map_all(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(_mapped(self.tensors, change), _mapped(self.on_cpu, change))


def _mapped(tensors: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(tensor) for name, tensor in tensors.items()}


def _cat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = {name: [part[name] for part in parts if name in part] for each in parts for name in each}
    for name, tensors in names.items():
        if len(tensors) != len(parts):
            raise ValueError(
                f"{len(tensors)} of {len(parts)} conditionings have {name}: give it to all of them or to none"
            )
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = ", ".join(str(list(tensor.shape[1:])) for tensor in tensors)
            raise ValueError(f"rows of {name} have different shapes, {shapes}: join them by their model")
    return {name: torch.cat(tensors) for name, tensors in names.items()}
