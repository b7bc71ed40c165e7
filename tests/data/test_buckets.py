"""The buckets that pictures get, against every size that there could be."""

import math

import pytest

from trajectory_consistency.trainer.data.buckets import Buckets, CropPlan, Size

SIZES = [Size(h, w) for h in range(40, 2600, 170) for w in range(40, 2600, 130)]


def full_resolution(resolution: int, step: int) -> set[Size]:
    """By trying all: of sizes with at most resolution^2 pixels those that one step more in the longer side exceeds."""
    sides = [side for side in range(step, 2 * resolution + 1, step) if side >= resolution / 2]
    fitting = {Size(h, w) for h in sides for w in sides if h * w <= resolution**2}
    short = {size for size in fitting if min(size) <= resolution}
    return {
        size
        for size in short
        if (size.height <= size.width and (size.width == max(w for h, w in fitting if h == size.height)))
        or (size.height >= size.width and (size.height == max(h for h, w in fitting if w == size.width)))
    }


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (768, 64), (512, 8), (640, 32)])
def test_a_large_picture_gets_the_bucket_nearest_to_its_aspect(resolution: int, step: int) -> None:
    possible = full_resolution(resolution, step)
    for original in SIZES:
        large = Size(original.height * 40, original.width * 40)
        crop = Buckets(resolution, step).fit(large)
        assert crop is not None and crop.bucket in possible
        cropped = {size: abs(math.log(size.width / size.height * large.height / large.width)) for size in possible}
        assert cropped[crop.bucket] == pytest.approx(min(cropped.values()))


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_buckets_have_about_the_area_and_the_turned_picture_gets_the_turned_one(resolution: int) -> None:
    for size in full_resolution(resolution, 64):
        assert 0.9 * resolution**2 <= size.height * size.width <= resolution**2
    rule = Buckets(resolution)
    for original in SIZES:
        crop, turned = rule.fit(original), rule.fit(Size(original.width, original.height))
        if crop is None or turned is None:
            assert crop is turned is None
        else:
            assert turned.bucket == Size(crop.bucket.width, crop.bucket.height)
            assert (turned.top, turned.left) == (crop.left, crop.top)


def check_geometry(original: Size, crop: CropPlan, step: int) -> None:
    assert crop.original == original
    assert crop.bucket.height % step == crop.bucket.width % step == 0
    assert crop.resized.height >= crop.bucket.height and crop.resized.width >= crop.bucket.width
    assert (
        crop.resized.height == crop.bucket.height or crop.resized.width == crop.bucket.width
    )  # no more is cut than must
    assert abs(crop.top * 2 + crop.bucket.height - crop.resized.height) <= 1  # from the center
    assert abs(crop.left * 2 + crop.bucket.width - crop.resized.width) <= 1
    across, down = crop.resized.width / original.width, crop.resized.height / original.height
    # one scale for both sides, but for rounding to whole pixels
    assert abs(across - down) <= 0.5 / original.width + 0.5 / original.height + 1e-9


def test_nothing_is_enlarged_unless_asked_for() -> None:
    for original in SIZES:
        crop = Buckets(1024).fit(original)
        if crop is None:
            assert min(original) < 128
            continue
        check_geometry(original, crop, 64)
        assert crop.resized.height <= original.height and crop.resized.width <= original.width
        enlarged = Buckets(1024, upscale=True).fit(original)
        assert enlarged is not None
        check_geometry(original, enlarged, 64)
        assert enlarged.bucket.height * enlarged.bucket.width >= 0.9 * 1024**2


def test_a_smaller_picture_gets_a_smaller_bucket_of_its_own_aspect() -> None:
    assert Buckets(1024).fit(Size(600, 900)).bucket == Size(512, 768)  # type: ignore[union-attr]
    assert Buckets(1024).fit(Size(1000, 1000)).bucket == Size(896, 896)  # type: ignore[union-attr]
    assert Buckets(512).fit(Size(500, 500)).bucket == Size(448, 448)  # type: ignore[union-attr]
    assert Buckets(64).fit(Size(64, 64)) == CropPlan(Size(64, 64), Size(64, 64), Size(64, 64), 0, 0)
    assert Buckets(64).fit(Size(63, 640)) is None


def test_squares_alone() -> None:
    for original in SIZES:
        crop = Buckets(512, square=True).fit(original)
        assert crop is None or crop.bucket.height == crop.bucket.width <= 512


def test_the_framing_of_a_crop() -> None:
    crop = Buckets(1024).fit(Size(1500, 3000))
    assert crop is not None and (crop.resized, crop.bucket) == (Size(736, 1472), Size(704, 1472))
    assert crop.framing.to_rows().tolist() == [[1500, 3000, 16, 0, 704, 1472]]


def test_a_size_is_read_as_it_is_written() -> None:
    assert str(Size(512, 768)) == "768x512" and Size.parse("768x512") == Size(512, 768)
