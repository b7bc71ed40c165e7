"""Bytes of an image file to pixels: upright, RGB, without alpha, resized and cut to a bucket.

Flows in: bytes.  Flows out: Pillow images of mode RGB, and tensors.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Fit, Size

SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# What Pillow raises for damaged files of one format or another.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenPictureError(ValueError):
    """The bytes are not a whole picture that can be shown as RGB."""


def decode(data: bytes) -> Image.Image:
    """A picture as RGB: its first frame, turned as EXIF says, on white where it is transparent.

    Raises BrokenPictureError for whatever does not decode to its end.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        raise BrokenPictureError(str(error)) from error


def size_of(image: Image.Image) -> Size:
    """Height and width."""
    return Size(image.height, image.width)


def pixels(image: Image.Image, fit: Fit) -> Tensor:
    """The picture as uint8 [3, height, width] of its bucket."""
    if fit.resized != fit.original:
        image = image.resize((fit.resized.width, fit.resized.height), Image.Resampling.LANCZOS)
    image = image.crop((fit.left, fit.top, fit.left + fit.bucket.width, fit.top + fit.bucket.height))
    return torch.from_numpy(rearrange(np.array(image), "h w c -> c h w"))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip at 255
        gray = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of which nothing says what is black and what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
