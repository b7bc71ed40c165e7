"""Small pictures of numbers as SVG: curves and a map of colors, in the colors of the page that they stand in.

Flows in: numbers.  Flows out: text to put into a page, whose style sheet has the classes used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 14, 34
_POINTS = 600  # of a curve, after which a screen shows no more
_CELL = 34


def curve(name: str, xs: Sequence[float], ys: Sequence[float], *, smooth: int = 1, logarithmic: bool = False) -> str:
    """A curve of ys over ascending xs, faint, and over it, strong, its mean over the last `smooth` values.

    Values that are not finite, or with logarithmic=True not positive, are left out.
    """
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    points = [(x, scale(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not logarithmic)]
    if not points:
        return f'<p class="empty">{escape(name)}: nothing yet</p>'
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        return (
            f"{_LEFT + across * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM):.1f}"
        )

    marks = []
    for k in range(5):
        y = low + (high - low) * k / 4
        level = place(first, y).split(",")[1]
        text = f"{10**y if logarithmic else y:.3g}"
        marks.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level}" y2="{level}"/>')
        marks.append(f'<text x="{_LEFT - 8}" y="{level}" class="left">{text}</text>')
    for x, side in ((first, "start"), (last, "end")):
        across = place(x, low).split(",")[0]
        marks.append(f'<text x="{across}" y="{_HEIGHT - 10}" text-anchor="{side}">{x:g}</text>')
    lines = _line("faint", points, place) + _line("strong", _means(points, smooth), place)
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(name)} by step">{"".join(marks)}{lines}</svg></figure>'
    )


def _line(kind: str, points: Sequence[tuple[float, float]], place: Callable[[float, float], str]) -> str:
    thin = points[:: max(1, len(points) // _POINTS)]
    return f'<polyline class="{kind}" points="{" ".join(place(x, y) for x, y in [*thin, points[-1]])}"/>'


def _means(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    total, means = 0.0, []
    for k, (x, y) in enumerate(points):
        total += y - (points[k - width][1] if k >= width else 0.0)
        means.append((x, total / min(k + 1, width)))
    return means


def color_map(values: Sequence[Sequence[float]], labels: Sequence[str], across: str, down: str) -> str:
    """A square to each value [rows][columns], the stronger the greater on a logarithmic scale; NaN is left empty."""
    known = [math.log(v) for row in values for v in row if v > 0]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    left, top = 84, 8
    cells = []
    for i, row in enumerate(values):
        y = top + i * _CELL
        cells.append(f'<text class="left" x="{left - 8}" y="{y + _CELL / 2}">{labels[i]}</text>')
        for j, value in enumerate(row):
            if not math.isnan(value):
                share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
                cells.append(
                    f'<rect class="cell" x="{left + j * _CELL}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" '
                    f'fill-opacity="{0.08 + 0.92 * share:.2f}"><title>{down} {labels[i]}, {across} {labels[j]}: '
                    f"{value:.4g}</title></rect>"
                )
    bottom = top + len(values) * _CELL
    for j, label in enumerate(labels):
        start = label.split("-")[0].lstrip("0") or "0"
        x = left + (j + 0.5) * _CELL
        cells.append(f'<text text-anchor="middle" x="{x}" y="{bottom + 12}">{start}</text>')
    width = left + len(labels) * _CELL
    cells.append(f'<text text-anchor="middle" x="{(left + width) / 2}" y="{bottom + 34}">{across}</text>')
    return (
        f'<figure class="map"><figcaption>{down} down, {across} across</figcaption>'
        f'<svg viewBox="0 0 {width + 4} {bottom + 44}" role="img" aria-label="loss by {down} and {across}">'
        f"{''.join(cells)}</svg></figure>"
    )
