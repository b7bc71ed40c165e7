"""Aspect-ratio buckets: sizes of about equal area and different aspect ratios, so that little is cropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import NamedTuple

import torch

from ..models.framing import Framing

MAX_STRETCH = 2
"""Sides are at least resolution / 2 and at most resolution * 2, so that aspect ratios range from 1:4 to 4:1."""


class Size(NamedTuple):
    """The size of a picture in pixels; its text is WIDTHxHEIGHT."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @staticmethod
    def parse(text: str) -> Size:
        """Parse a size from WIDTHxHEIGHT."""
        width, _, height = text.partition("x")
        return Size(int(height), int(width))


class CropPlan(NamedTuple):
    """How a picture is brought to its bucket's size: resized, then cropped.

    The crop has the bucket's size and starts at (top, left) of the resized picture, in pixels.
    """

    original: Size
    resized: Size
    bucket: Size
    top: int
    left: int

    @property
    def framing(self) -> Framing:
        """The same as a Framing of one row."""
        numbers = (*self.original, self.top, self.left, *self.bucket)
        return Framing.from_rows(torch.tensor([numbers], dtype=torch.int32))


@dataclass(frozen=True)
class Buckets:
    """The rule that assigns a bucket to each picture."""

    resolution: int
    """Buckets have at most resolution^2 pixels."""
    step: int = 64
    """Sides of buckets are multiples of this, in pixels."""
    square: bool = False
    """Use only square buckets."""
    upscale: bool = False
    """Enlarge small pictures to the full resolution instead of assigning them smaller buckets."""

    def fit(self, original: Size) -> CropPlan | None:
        """Return how a picture of this size is resized and center-cropped, or None if every bucket is larger.

        The bucket is the one with the nearest aspect ratio at the full resolution.  If it is larger than the picture
        and `upscale` is not set, lower resolutions are tried, in decrements of an eighth, rounded up to a multiple of
        `step`.
        """
        top = self.resolution // self.step * self.step
        for resolution in range(top, 0, -self.step * -(-top // (8 * self.step))):
            bucket = _nearest_aspect(original, _bucket_sizes(resolution, self.step, self.square))
            if self.upscale or (bucket.height <= original.height and bucket.width <= original.width):
                return _crop_center(original, bucket)
        return None


@lru_cache
def _bucket_sizes(resolution: int, step: int, square: bool) -> tuple[Size, ...]:
    """Return all buckets of a resolution.

    For each height up to `resolution`, the width is the greatest within MAX_STRETCH that gives at most resolution^2
    pixels.  The same sizes with height and width exchanged are added.
    """
    if square:
        return (Size(resolution, resolution),)
    low, high = -(-resolution // (MAX_STRETCH * step)) * step, MAX_STRETCH * resolution
    wide = {Size(side, min(resolution**2 // side // step * step, high)) for side in range(low, resolution + 1, step)}
    return tuple(sorted(wide | {Size(size.width, size.height) for size in wide}))


def _nearest_aspect(original: Size, sizes: tuple[Size, ...]) -> Size:
    """Return the size that crops least; in a tie, the size with most pixels, then the size closest to square."""
    aspect = log(original.width / original.height)

    def preference(size: Size) -> tuple[float, int, int]:
        # Rounded, so that a tie between two buckets is also a tie when the picture is rotated by 90 degrees.
        return round(abs(log(size.width / size.height) - aspect), 9), -size.height * size.width, max(size)

    return min(sizes, key=preference)


def _crop_center(original: Size, bucket: Size) -> CropPlan:
    """Resize to the smallest size of the same aspect ratio that covers the bucket, and crop the center."""
    scale = max(bucket.height / original.height, bucket.width / original.width)
    height = max(bucket.height, round(original.height * scale))
    width = max(bucket.width, round(original.width * scale))
    return CropPlan(original, Size(height, width), bucket, (height - bucket.height) // 2, (width - bucket.width) // 2)
