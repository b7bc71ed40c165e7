"""The grid of pictures: everything stands where a reader looks for it, and nothing is cut off or drawn over."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from trajectory_consistency.trainer.views.grid import Row, draw_grid

CAPTIONS = ["a red circle left on a blue background", "a white star", "a yellow triangle bottom on a green background"]
LABELS = ["A long label, 50 steps", "TCD\n4 steps", "LCM"]
Box = tuple[int, int, int, int]


def color_of(row: int, column: int) -> list[int]:
    return [60 + 40 * row, 200 - 50 * column, 30]


def flat(color: Sequence[int]) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)


@pytest.fixture
def rows() -> list[Row]:
    """Rows of pictures each of a color of its own."""
    numbers = [{"distance to data": "123.45", "accuracy": "100%"}, {"distance to data": "1.00", "accuracy": "9%"}, {}]
    pictures = [torch.cat([flat(color_of(r, c)) for c in range(len(CAPTIONS))]) for r in range(len(LABELS))]
    return [Row(*parts) for parts in zip(LABELS, pictures, numbers, strict=True)]


def box_of(page: Image.Image, color: Sequence[int]) -> Box:
    """The box around all pixels of a color: left, top, right, bottom."""
    ys, xs = np.nonzero((np.asarray(page) == np.array(color)).all(2))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def changed(first: Image.Image, second: Image.Image) -> Box:
    assert first.size == second.size
    box = ImageChops.difference(first, second).getbbox()
    assert box is not None, "the pages are equal"
    return box


def with_row(rows: list[Row], index: int, row: Row) -> list[Row]:
    return [*rows[:index], row, *rows[index + 1 :]]


def test_each_picture_stands_in_its_row_and_column_at_twice_its_size(rows: list[Row]) -> None:
    page = draw_grid(rows, CAPTIONS, "Title")
    boxes = [[box_of(page, color_of(r, c)) for c in range(3)] for r in range(3)]
    left, top = boxes[0][0][:2]
    step = boxes[0][1][0] - left
    assert 128 < step < 148
    for r in range(3):
        for c in range(3):
            x, y = left + c * step, top + r * step
            assert boxes[r][c] == (x, y, x + 128, y + 128)


def test_pictures_are_neither_turned_nor_mirrored() -> None:
    corner = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    corner[0, :, :16, 32:] = torch.tensor([200, 10, 60], dtype=torch.uint8).view(3, 1, 1)
    page = draw_grid([Row("", corner)], ["x"], "")
    whole, part = box_of(page, [128] * 3), box_of(page, [200, 10, 60])
    assert part[1] == whole[1] and part[2] == whole[2]  # at the top and at the right
    assert part[0] - whole[0] == pytest.approx(64, abs=6) and part[3] - part[1] == pytest.approx(32, abs=6)


def test_a_label_stands_left_of_its_row(rows: list[Row]) -> None:
    page = draw_grid(rows, CAPTIONS, "Title")
    for index, label in [(1, "TCD\n8 steps"), (1, "LCM\n4 steps"), (2, "TCD")]:
        other = draw_grid(with_row(rows, index, replace(rows[index], label=label)), CAPTIONS, "Title")
        picture, box = box_of(page, color_of(index, 0)), changed(page, other)
        assert box[2] < picture[0] and picture[1] < box[1] and box[3] < picture[3]


def test_a_number_stands_right_of_its_row_under_its_name(rows: list[Row]) -> None:
    page = draw_grid(rows, CAPTIONS, "Title")
    picture = box_of(page, color_of(1, 2))
    boxes = {}
    for name in ("distance to data", "accuracy"):
        without = with_row(rows, 1, replace(rows[1], numbers={k: v for k, v in rows[1].numbers.items() if k != name}))
        boxes[name] = changed(page, draw_grid(without, CAPTIONS, "Title"))
        assert picture[2] < boxes[name][0] and picture[1] < boxes[name][1] and boxes[name][3] < picture[3]
    assert boxes["distance to data"][2] < boxes["accuracy"][0]
    renamed = [
        replace(row, numbers={k.replace("distance to data", "data to distance"): v for k, v in row.numbers.items()})
        for row in rows
    ]
    heading = changed(page, draw_grid(renamed, CAPTIONS, "Title"))
    assert heading[3] < box_of(page, color_of(0, 0))[1]
    assert picture[2] < heading[0] and heading[2] < boxes["accuracy"][0]


def test_a_caption_stands_above_its_column_and_within_it(rows: list[Row]) -> None:
    page = draw_grid(rows, CAPTIONS, "Title")
    for index, caption in enumerate(CAPTIONS):
        captions = [*CAPTIONS[:index], caption.replace("a ", "the "), *CAPTIONS[index + 1 :]]
        picture, box = box_of(page, color_of(0, index)), changed(page, draw_grid(rows, captions, "Title"))
        assert picture[0] <= box[0] and box[2] <= picture[2] and box[3] < picture[1]


def test_the_title_stands_above_all(rows: list[Row]) -> None:
    page = draw_grid(rows, CAPTIONS, "Title")
    title = changed(page, draw_grid(rows, CAPTIONS, ""))
    captions = changed(page, draw_grid(rows, ["e red circle left on a blue background", *CAPTIONS[1:]], "Title"))
    assert title[3] < captions[1]


@pytest.mark.parametrize("title", ["Title", "A title that is a good deal wider than two columns of pictures " * 2])
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_cut_off_at_the_edge(rows: list[Row], title: str, count: int) -> None:
    rows = [replace(row, pictures=row.pictures[:count]) for row in rows]
    pixels = np.asarray(draw_grid(rows, CAPTIONS[:count], title))
    for edge in (pixels[:16], pixels[-16:], pixels[:, :16], pixels[:, -16:]):
        assert (edge == 255).all()
    assert (pixels < 255).any()


def test_a_white_picture_has_an_edge_on_the_white_page() -> None:
    ink = (np.asarray(draw_grid([Row("", flat([255, 255, 255]))], [""], "")) < 230).all(2)
    ys, xs = np.nonzero(ink)
    assert xs.max() - xs.min() == ys.max() - ys.min() == 129
    assert ink.sum() == 4 * 129


def test_a_line_divides_a_group_from_the_one_above(rows: list[Row]) -> None:
    plain, page = (
        draw_grid(with_row(rows, 2, replace(rows[2], starts_group=first)), CAPTIONS, "Title") for first in (0, 1)
    )
    assert [box_of(page, color_of(1, c)) for c in range(3)] == [box_of(plain, color_of(1, c)) for c in range(3)]
    above, below = box_of(page, color_of(1, 0)), box_of(page, color_of(2, 0))
    assert below[1] - above[3] > 2 * (box_of(plain, color_of(2, 0))[1] - above[3])
    between = np.asarray(page)[above[3] + 2 : below[1] - 2]
    lines = [y for y, row in enumerate(between) if (row == 255).all(1).mean() < 0.2]
    assert lines and lines[-1] - lines[0] == len(lines) - 1
    assert abs(lines[0] - (len(between) - 1 - lines[-1])) <= 1, "it is in the middle"
    first = with_row(rows, 0, replace(rows[0], starts_group=True))
    assert draw_grid(first, CAPTIONS, "Title").tobytes() == draw_grid(rows, CAPTIONS, "Title").tobytes()


def test_the_same_rows_make_the_same_page(rows: list[Row]) -> None:
    assert draw_grid(rows, CAPTIONS, "Title").tobytes() == draw_grid(rows, CAPTIONS, "Title").tobytes()


def test_an_empty_grid_is_refused(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="got 0 and 3"):
        draw_grid([], CAPTIONS, "Title")
    with pytest.raises(ValueError, match="got 3 and 0"):
        draw_grid(rows, [], "Title")


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
            r"'TCD\\n4 steps' needs pictures .*got torch.uint8 \[2, 3, 64, 64\]",
        ),
        (torch.zeros(3, 3, 64, 64), "got torch.float32"),
        (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), r"uint8 \[3, 3, 64, 64\].*got torch.uint8 \[3, 3, 32, 32\]"),
        (torch.zeros(3, 1, 64, 64, dtype=torch.uint8), r"\[3, 1, 64, 64\]"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), r"got torch.uint8 \[3, 64, 64\]"),
        (torch.zeros(3, 3, 64, dtype=torch.uint8), r"got torch.uint8 \[3, 3, 64\]"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_row_of_other_pictures_is_refused(rows: list[Row], pictures: Tensor, message: str, first: bool) -> None:
    changed_rows = with_row(rows, 1, replace(rows[1], pictures=pictures))
    if first and pictures.shape[-1] == 64:
        changed_rows = changed_rows[1:]
    with pytest.raises(ValueError, match=message):
        draw_grid(changed_rows, CAPTIONS, "Title")


@pytest.mark.parametrize("place", ["label", "number", "name", "caption", "title"])
def test_a_text_that_the_font_cannot_write_is_refused(rows: list[Row], place: str) -> None:
    text = {name: "Fr\u00e9chet" if name == place else "x" for name in ("label", "number", "name", "caption", "title")}
    row = Row(text["label"], rows[0].pictures[:1], {text["name"]: text["number"]})
    with pytest.raises(ValueError, match="ASCII only, got 'Fr\u00e9chet'"):
        draw_grid([row], [text["caption"]], text["title"])
