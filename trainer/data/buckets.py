"""Sizes that pictures are trained at: of about one area, in several aspects, so that little is cropped away.

Flows in: the size of a picture.  Flows out: the `Fit` that says how it is resized and cropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import NamedTuple

MAX_STRETCH = 2
"""Sides are from resolution / 2 to resolution * 2, so that aspects reach from 1:4 to 4:1."""


class Size(NamedTuple):
    """Of a picture, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @staticmethod
    def parse(text: str) -> Size:
        """The size that is written so."""
        width, _, height = text.partition("x")
        return Size(int(height), int(width))


class Fit(NamedTuple):
    """How a picture comes to its bucket: resized, then cut `top` and `left` of its pixels in."""

    original: Size
    resized: Size
    bucket: Size
    top: int
    left: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Original size, crop top and left, target size; each height before width, as SDXL is conditioned on them."""
        return (*self.original, self.top, self.left, *self.bucket)


@dataclass(frozen=True)
class Buckets:
    """The rule by which a picture gets its bucket."""

    resolution: int
    """Buckets hold at most resolution^2 pixels."""
    step: int = 64
    """Sides of buckets are multiples of it."""
    square: bool = False
    """Squares alone."""
    upscale: bool = False
    """Enlarge small pictures to the full resolution, instead of giving them smaller buckets."""

    def fit(self, original: Size) -> Fit | None:
        """How a picture of this size is resized and center-cropped; None when it is smaller than every bucket.

        It gets the bucket nearest to its aspect among those of the full resolution; when that would enlarge it, among
        those of the greatest lower resolution, in eighths rounded up to steps, that does not.
        """
        top = self.resolution // self.step * self.step
        for resolution in range(top, 0, -self.step * -(-top // (8 * self.step))):
            bucket = _nearest(original, _sizes(resolution, self.step, self.square))
            if self.upscale or (bucket.height <= original.height and bucket.width <= original.width):
                return _fill(original, bucket)
        return None


@lru_cache
def _sizes(resolution: int, step: int, square: bool) -> tuple[Size, ...]:
    """For each height the greatest width with at most resolution^2 pixels, and the same turned; both within bounds."""
    if square:
        return (Size(resolution, resolution),)
    low, high = -(-resolution // (MAX_STRETCH * step)) * step, MAX_STRETCH * resolution
    wide = {Size(side, min(resolution**2 // side // step * step, high)) for side in range(low, resolution + 1, step)}
    return tuple(sorted(wide | {Size(size.width, size.height) for size in wide}))


def _nearest(original: Size, sizes: tuple[Size, ...]) -> Size:
    """The size of which the least is cropped; of those alike the largest, then the least long."""
    aspect = log(original.width / original.height)

    def cropped(size: Size) -> tuple[float, int, int]:
        # Rounded, for a picture just between two buckets to be so turned by 90 degrees, too.
        return round(abs(log(size.width / size.height) - aspect), 9), -size.height * size.width, max(size)

    return min(sizes, key=cropped)


def _fill(original: Size, bucket: Size) -> Fit:
    """Resize to the smallest size of the same aspect that covers the bucket, and cut the bucket from its center."""
    scale = max(bucket.height / original.height, bucket.width / original.width)
    height = max(bucket.height, round(original.height * scale))
    width = max(bucket.width, round(original.width * scale))
    return Fit(original, Size(height, width), bucket, (height - bucket.height) // 2, (width - bucket.width) // 2)
