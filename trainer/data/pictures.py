"""Decode image files to RGB, and resize and crop them to their bucket."""

from __future__ import annotations

import io

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .buckets import CropPlan, Size

SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Suffixes of image files, lower case."""


class BrokenPictureError(ValueError):
    """The bytes are not a complete picture, or cannot be converted to RGB."""


def decode(data: bytes) -> Image.Image:
    """Decode a picture to RGB: the first frame, rotated according to EXIF, transparency blended with white.

    Raises BrokenPictureError, with the reason, if the bytes are not a complete picture or its mode cannot be converted.
    """
    if not data:
        raise BrokenPictureError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BrokenPictureError("not a picture of a known format") from error
    except Exception as error:  # each decoder has errors of its own, such as RuntimeError for AVIF
        raise BrokenPictureError(str(error) or type(error).__name__) from error


def size_of(image: Image.Image) -> Size:
    """Return the size of an image."""
    return Size(image.height, image.width)


def pixels(image: Image.Image, crop: CropPlan) -> Tensor:
    """Resize and crop a picture to its bucket, and return it as uint8 [3, H, W]."""
    if crop.resized != crop.original:
        image = image.resize((crop.resized.width, crop.resized.height), Image.Resampling.LANCZOS)
    image = image.crop((crop.left, crop.top, crop.left + crop.bucket.width, crop.top + crop.bucket.height))
    return torch.from_numpy(rearrange(np.array(image), "h w c -> c h w"))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's conversion would clip at 255
        gray = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, and nothing says what is black and what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
