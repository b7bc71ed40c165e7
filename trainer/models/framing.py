"""The framing of training pictures: how each was cut out of its original. SDXL, among others, gets it as input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Framing(NamedTuple):
    """How B pictures were cut out of their originals, in pixels: each original was resized, then cropped.

    Each field is an integer tensor [B, 2], with the vertical number before the horizontal one.
    """

    original: Tensor
    """Height and width of the original, before it was resized."""
    crop: Tensor
    """Top and left of the crop, in the resized picture."""
    target: Tensor
    """Height and width of the picture that is left."""

    @staticmethod
    def whole(height: int, width: int, count: int = 1, device: torch.device | str = "cpu") -> Framing:
        """Return the framing of `count` pictures that are neither resized nor cropped."""
        size = torch.tensor([height, width], dtype=torch.int32, device=device).expand(count, -1)
        return Framing(original=size, crop=torch.zeros_like(size), target=size)

    @staticmethod
    def from_rows(rows: Tensor) -> Framing:
        """Return the framing of rows [B, 6], as `to_rows` returned them."""
        return Framing(*rows.split(2, dim=-1))

    def to_rows(self) -> Tensor:
        """Return one row of numbers for each picture, [B, 6], as the cache stores them: original, crop, target."""
        return torch.cat(list(self), dim=-1)
