"""Draws a labeled grid of pictures: one row for each method, one column for each caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

_GAP_PX = 6  # between pictures
_MARGIN_PX = 32  # around the page
_TEXT_GAP_X_PX = 24  # between pictures or numbers and the text at their left
_TEXT_GAP_Y_PX = 10  # between pictures and the text above them
_GROUP_GAP_PX, _LINE_PX = 28, 3  # between groups of rows; thickness of the line within this gap
_PAPER, _INK, _FAINT, _FRAME, _LINE = (255, 255, 255), (25, 25, 30), (115, 115, 122), (205, 205, 210), (140, 140, 148)
_TITLE = ImageFont.load_default(26)
_LABEL = ImageFont.load_default(19)
_SMALL = ImageFont.load_default(15)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One row of the grid."""

    label: str
    """At most two lines; the second is set in small type."""
    pictures: Tensor
    """One picture for each caption, uint8 [N, 3, H, W]."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Texts at the right of the pictures, by column name, which may have several lines."""
    starts_group: bool = False
    """Whether the row is the first of a group; a line then separates it from the row above, if there is one."""


def draw_grid(rows: Sequence[Row], captions: Sequence[str], title: str, *, scale: float = 2) -> Image.Image:
    """Draw `rows` under `captions`, with labels at the left, numbers at the right and `title` above.

    scale: size of a picture on the page relative to its own.

    Raises ValueError if there are no rows or captions, if a row does not have one picture for each caption, all of the
    same size, or if a text is not ASCII, which is all that the built-in font can write.
    """
    _check(rows, captions, title)
    layout = _PageLayout(rows, captions, title, scale)
    page = Image.new("RGB", layout.size, _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN_PX, _MARGIN_PX), title, _INK, _TITLE)
    for column, caption in enumerate(layout.captions):
        center = layout.left + column * layout.step_x + layout.cell[0] // 2
        pen.text((center, layout.top - _TEXT_GAP_Y_PX), caption, _INK, _SMALL, anchor="md", align="center")
    for name, edge in layout.edges.items():
        pen.text((edge, layout.top - _TEXT_GAP_Y_PX), name, _FAINT, _SMALL, anchor="rd", align="right")
    for row, y in zip(rows, layout.tops, strict=True):
        if row.starts_group and y > layout.top:
            _draw_line(pen, layout, y)
        _draw_pictures(page, row.pictures, layout, y)
        _draw_texts(pen, row, layout, y + layout.cell[1] // 2)
    return page


class _PageLayout:
    """Positions and sizes of everything on the page, in pixels from its top left corner."""

    def __init__(self, rows: Sequence[Row], captions: Sequence[str], title: str, scale: float) -> None:
        height, width = (round(scale * side) for side in rows[0].pictures.shape[2:])
        self.cell = width, height
        self.step_x = width + _GAP_PX
        self.captions = [_wrap(caption, width - 2 * _GAP_PX) for caption in captions]
        names = list(dict.fromkeys(name for row in rows for name in row.numbers))
        self.left = _MARGIN_PX + max(_label_width(row.label) for row in rows) + _TEXT_GAP_X_PX
        self.top = 2 * _MARGIN_PX + _height("A", _TITLE) + max(_height(t, _SMALL) for t in [*self.captions, *names])
        self.tops = [self.top]  # the upper edge of each row of pictures
        for row in rows[1:]:
            self.tops.append(self.tops[-1] + height + (_GROUP_GAP_PX if row.starts_group else _GAP_PX))
        right = self.left + len(captions) * self.step_x - _GAP_PX
        self.edges: dict[str, int] = {}  # the right edge of each column of numbers
        for name in names:
            texts = [row.numbers.get(name, "") for row in rows]
            right += _TEXT_GAP_X_PX + max(_width(name, _SMALL), *(_width(text, _LABEL) for text in texts))
            self.edges[name] = right
        self.right = max(right, _MARGIN_PX + _width(title, _TITLE))
        self.size = self.right + _MARGIN_PX, self.tops[-1] + height + _MARGIN_PX


def _draw_line(pen: ImageDraw.ImageDraw, layout: _PageLayout, y: int) -> None:
    """Draw a line in the middle of the gap above the row at y."""
    top = y - (_GROUP_GAP_PX + _LINE_PX) // 2
    pen.rectangle((_MARGIN_PX, top, layout.right - 1, top + _LINE_PX - 1), _LINE)


def _draw_pictures(page: Image.Image, pictures: Tensor, layout: _PageLayout, y: int) -> None:
    for column, pixels in enumerate(rearrange(pictures.cpu().numpy(), "b c h w -> b h w c")):
        picture = Image.fromarray(pixels).resize(layout.cell, Image.Resampling.LANCZOS)
        framed = ImageOps.expand(picture, 1, _FRAME)  # to show the edge of a white picture on the white page
        page.paste(framed, (layout.left + column * layout.step_x - 1, y - 1))


def _draw_texts(pen: ImageDraw.ImageDraw, row: Row, layout: _PageLayout, middle: int) -> None:
    label, _, detail = row.label.partition("\n")
    pen.text((_MARGIN_PX, middle), label, _INK, _LABEL, anchor="ls" if detail else "lm")
    pen.text((_MARGIN_PX, middle + 6), detail, _FAINT, _SMALL, anchor="la")
    for name, text in row.numbers.items():
        pen.text((layout.edges[name], middle), text, _INK, _LABEL, anchor="rm")


def _label_width(label: str) -> int:
    head, _, detail = label.partition("\n")
    return max(_width(head, _LABEL), _width(detail, _SMALL))


def _wrap(text: str, width: int) -> str:
    """Break `text` between words into lines of at most `width` pixels; a longer single word stays as it is."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", _SMALL) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _width(text: str, font: _Font) -> int:
    return round(max((font.getlength(line) for line in text.splitlines()), default=0))


def _height(text: str, font: _Font) -> int:
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return round(pen.textbbox((0, 0), text, font)[3])


def _check(rows: Sequence[Row], captions: Sequence[str], title: str) -> None:
    if not rows or not captions:
        raise ValueError(f"a grid needs at least one row and one caption, got {len(rows)} and {len(captions)}")
    expected = (len(captions), 3, *rows[0].pictures.shape[-2:])
    texts = [title, *captions]
    for row in rows:
        texts += [row.label, *row.numbers, *row.numbers.values()]
        if row.pictures.shape != expected or row.pictures.dtype != torch.uint8:
            raise ValueError(
                f"the row {row.label!r} needs pictures uint8 {list(expected)}, one for each caption, "
                f"got {row.pictures.dtype} {list(row.pictures.shape)}"
            )
    for text in texts:
        if not text.isascii():
            raise ValueError(f"the built-in font writes ASCII only, got {text!r}")
