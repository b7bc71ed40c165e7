"""What becomes of image files of every kind, and of damaged ones."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import BmpImagePlugin, Image, features

from trajectory_consistency.trainer.data.buckets import Buckets, Size
from trajectory_consistency.trainer.data.pictures import BrokenPictureError, decode, pixels, size_of

AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(color: object, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)  # type: ignore[arg-type]


def center(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))  # type: ignore[return-value]


def palette(transparent: bool) -> bytes:
    image = plain((200, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(image, "PNG", **({"transparency": image.getpixel((0, 0))} if transparent else {}))


def gray16(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), value, np.uint16)), "PNG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(plain((10, 20, 30)), "PNG"), (10, 20, 30)),
        (encoded(plain((10, 20, 30)), "BMP"), (10, 20, 30)),
        (encoded(plain((10, 20, 30)), "TIFF"), (10, 20, 30)),
        (encoded(plain((10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
        (encoded(plain(90, "L"), "PNG"), (90, 90, 90)),
        (encoded(plain(1, "1"), "PNG"), (255, 255, 255)),
        (encoded(plain((10, 20, 30, 0), "RGBA"), "PNG"), (255, 255, 255)),
        (encoded(plain((0, 0, 0, 128), "RGBA"), "PNG"), (127, 127, 127)),
        (encoded(plain((0, 0), "LA"), "PNG"), (255, 255, 255)),
        (palette(transparent=False), (200, 0, 0)),
        (palette(transparent=True), (255, 255, 255)),
        (gray16(0), (0, 0, 0)),
        (gray16(200 * 257), (200, 200, 200)),
        (gray16(65535), (255, 255, 255)),
        (encoded(plain((0, 255, 255, 0), "CMYK"), "TIFF"), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(data: bytes, expected: tuple[int, ...]) -> None:
    assert center(data) == expected


def test_a_cmyk_jpeg_is_near_its_color() -> None:
    assert np.allclose(center(encoded(plain((0, 255, 255, 0), "CMYK"), "JPEG")), (255, 0, 0), atol=10)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [plain("red"), plain("blue"), plain("lime")]
    red = center(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert red[0] > 200 > 60 > max(red[1:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_and_its_size(orientation: int) -> None:
    upright = Image.new("RGB", (30, 20), "black")
    upright.paste((255, 255, 255), (0, 0, 15, 10))  # white at the upper left, once it is turned
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation in turn else upright
    exif = stored.getexif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif))
    assert size_of(found) == Size(20, 30) and np.array_equal(np.asarray(found), np.asarray(upright))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BrokenPictureError, match="nothing says what is black"):
        decode(encoded(Image.new("F", (8, 6), 0.5), "TIFF"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of much that it then reads
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", AVIF])
def test_damage_of_any_sort_is_one_error_or_none(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    whole, rng = encoded(Image.fromarray(noise), kind), random.Random(0)
    cut = 0
    for k in range(150):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        try:
            decode(bytes(damaged))
            decode(whole[: len(whole) * k // 150])
        except BrokenPictureError:
            cut += 1
    assert cut > 50


def test_a_picture_that_ends_early_is_broken() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG")
    for data in (whole[: len(whole) // 2], b"", b"no picture at all"):
        with pytest.raises(BrokenPictureError):
            decode(data)


@pytest.mark.parametrize("error", [RuntimeError("a decoder"), AttributeError("of its own"), MemoryError(), Exception()])
def test_whatever_a_decoder_raises_the_picture_is_broken_and_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(_: Image.Image) -> None:
        raise error

    data = encoded(plain("red"), "BMP")
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    with pytest.raises(BrokenPictureError, match=f"^{str(error) or type(error).__name__}$"):
        decode(data)


def test_a_picture_of_too_many_pixels_or_none_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BrokenPictureError, match="could be decompression bomb"):
        decode(encoded(plain("red"), "PNG"))
    with pytest.raises(BrokenPictureError, match="the file is empty"):
        decode(b"")
    flat = bytearray(encoded(plain("red"), "BMP"))
    flat[18:22] = bytes(4)  # the width
    with pytest.raises(BrokenPictureError, match="not a picture of a known format"):
        decode(bytes(flat))


@pytest.mark.parametrize("size", [(700, 1500), (1500, 700), (512, 512), (513, 700), (641, 515)])
def test_the_crop_is_where_it_is_said_to_be(size: tuple[int, int]) -> None:
    """A picture whose pixels say where they are: red grows with x, green with y, from 0 to 1 over the whole."""
    height, width = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    image = Image.fromarray((np.stack([x, y, 0 * x], 2) * 255).round().astype(np.uint8))
    crop = Buckets(512).fit(Size(height, width))
    assert crop is not None
    found = pixels(image, crop)
    assert found.shape == (3, *crop.bucket) and found.dtype == torch.uint8
    left = (torch.arange(crop.bucket.width) + crop.left + 0.5) / crop.resized.width
    top = (torch.arange(crop.bucket.height) + crop.top + 0.5) / crop.resized.height
    inner = slice(4, -4)  # a filter has nothing to weigh beyond the edge
    assert (found[0].float().mean(0) / 255 - left)[inner].abs().max() < 1 / 255
    assert (found[1].float().mean(1) / 255 - top)[inner].abs().max() < 1 / 255
