"""Small pictures of numbers as SVG: curves and a map of colors, in the colors of the page that they stand in.

Flows in: numbers.  Flows out: text to put into a page, whose style sheet has the classes used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 640, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 14, 58
_POINTS = 600  # of a curve, after which a screen shows no more
_TICKS = 7  # at most, on an axis
_NARROW = 3.0  # the greatest over the least of values for which 1, 2, 5 x 10^k are too few ticks
_CELL_WIDTH, _CELL_HEIGHT, _LEGEND_PX = 40, 34, 12


class Axis:
    """From values to a share of an axis, and the values at which it has ticks."""

    def __init__(
        self, values: Sequence[float], *, logarithmic: bool = False, widen: bool = True, whole: bool = False
    ) -> None:
        """Span finite `values`, which are positive if `logarithmic`.

        widen: from the tick below to the tick above.  whole: ticks are whole numbers.
        """
        low, high = min(values), max(values)
        if high == low:
            low, high = (low / 2, high * 2) if logarithmic else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self._logarithmic = logarithmic
        ticks = _decades(low, high) if logarithmic and high / low >= _NARROW else _rounds(low, high, whole)
        if logarithmic:
            ticks = [tick for tick in ticks if tick > 0]
        if widen:
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        self.low, self.high = low, high
        self.ticks = [tick for tick in ticks if low <= tick <= high]

    def share(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1 at the high one."""
        low, high, at = (math.log(x) if self._logarithmic else x for x in (self.low, self.high, value))
        return (at - low) / (high - low)


def _rounds(low: float, high: float, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^k, evenly spaced, from `low` or just below to `high` or just above."""
    least = (high - low) / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 x 10^k, or if they are too many 10^k, from `low` or just below to `high` or just above."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1,)):
        every = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [x for x, after in pairwise(every) if after > low] + every[-1:]
        ticks = [x for before, x in pairwise([0.0, *ticks]) if before < high]
        if len(ticks) <= _TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / (_TICKS + 1))]


def curve(
    name: str,
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    across: str = "step",
    smooth: int = 1,
    logarithmic: bool = False,
    dots: bool = False,
) -> str:
    """A curve of ys over ascending xs, which are `across`, faint, and over it, strong, its mean over the last `smooth`.

    Values that are not finite, or with logarithmic=True not positive, are left out.  dots: mark each.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not logarithmic)]
    if not points:
        return f'<figure><figcaption>{escape(name)}</figcaption><p class="empty">nothing yet</p></figure>'
    x_axis = Axis([x for x, _ in points], widen=False, whole=True)
    y_axis = Axis([y for _, y in points], logarithmic=logarithmic)
    means = _means([y for _, y in points], smooth, logarithmic)
    drawn = _line("strong", [(x, y) for (x, _), y in zip(points, means, strict=True)], x_axis, y_axis)
    if smooth > 1:
        name += f", and its mean over {smooth} steps"
        drawn = _line("faint", points, x_axis, y_axis) + drawn
    if dots:
        drawn += "".join(
            f'<circle cx="{_x(x, x_axis):.1f}" cy="{_y(y, y_axis):.1f}" r="4"><title>{across} {x:g}: {y:.4g}</title>'
            "</circle>"
            for x, y in points
        )
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(name)} by {escape(across)}">{_axes(x_axis, y_axis, across)}{drawn}</svg></figure>'
    )


def _x(value: float, axis: Axis) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _TOP + (1 - axis.share(value)) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(x_axis: Axis, y_axis: Axis, across: str) -> str:
    """A line across at each tick of y, a short one at each of x, their numbers, and what is across."""
    marks, foot = [], _HEIGHT - _BOTTOM
    for tick in y_axis.ticks:
        y = f"{_y(tick, y_axis):.1f}"
        marks.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text x="{_LEFT - 8}" y="{y}" class="left">{_number(tick)}</text>')
    for tick in x_axis.ticks:
        x = f"{_x(tick, x_axis):.1f}"
        marks.append(f'<line class="rule" x1="{x}" x2="{x}" y1="{foot}" y2="{foot + 5}"/>')
        marks.append(f'<text x="{x}" y="{foot + 17}" text-anchor="middle">{_number(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{foot + 42}" text-anchor="middle">{escape(across)}</text>')
    return "".join(marks)


def _number(value: float) -> str:
    """A tick's number, without the zeros that an exponent is padded with."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def _line(kind: str, points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    thin = points[:: max(1, len(points) // _POINTS)]
    places = " ".join(f"{_x(x, x_axis):.1f},{_y(y, y_axis):.1f}" for x, y in [*thin, points[-1]])
    return f'<polyline class="{kind}" points="{places}"/>'


def _means(values: Sequence[float], width: int, geometric: bool) -> list[float]:
    """The mean of each value and those before it, `width` in all; geometric: of the logarithms."""
    scaled = [math.log(value) for value in values] if geometric else values
    total, means = 0.0, []
    for k, value in enumerate(scaled):
        total += value - (scaled[k - width] if k >= width else 0.0)
        mean = total / min(k + 1, width)
        means.append(math.exp(mean) if geometric else mean)
    return means


def color_map(values: Sequence[Sequence[float]], labels: Sequence[str], across: str, down: str) -> str:
    """A square to each value [rows][columns], the stronger the greater on a logarithmic scale; NaN is left empty."""
    known = [value for row in values for value in row if value > 0]
    axis = Axis(known or [1.0], logarithmic=True, widen=False)
    left, top = 84, 8
    bottom, right = top + len(values) * _CELL_HEIGHT, left + len(labels) * _CELL_WIDTH
    marks = []
    for i, row in enumerate(values):
        y = top + i * _CELL_HEIGHT
        marks.append(f'<text class="left" x="{left - 8}" y="{y + _CELL_HEIGHT / 2}">{labels[i]}</text>')
        for j, value in enumerate(row):
            if not math.isnan(value):
                share = axis.share(value) if value > 0 and len(set(known)) > 1 else 0.0
                marks.append(
                    f'<rect class="cell" x="{left + j * _CELL_WIDTH}" y="{y}" width="{_CELL_WIDTH - 2}" '
                    f'height="{_CELL_HEIGHT - 2}" fill-opacity="{_shade(share):.2f}">'
                    f"<title>{down} {labels[i]}, {across} {labels[j]}: {value:.4g}</title></rect>"
                )
    for j, label in enumerate(labels):
        start = label.partition("-")[0]
        x = left + (j + 0.5) * _CELL_WIDTH
        marks.append(f'<text text-anchor="middle" x="{x}" y="{bottom + 12}">{start}</text>')
    marks.append(f'<text text-anchor="middle" x="{(left + right) / 2}" y="{bottom + 34}">{across}</text>')
    if len(set(known)) > 1:
        marks.append(_legend(axis, left, right, bottom + 58))
    return (
        f'<figure class="map"><figcaption>mean loss: {down} down, {across} across</figcaption>'
        f'<svg viewBox="0 0 {right + 24} {bottom + 100}" role="img" aria-label="loss by {down} and {across}">'
        f"{''.join(marks)}</svg></figure>"
    )


def _shade(share: float) -> float:
    return 0.08 + 0.92 * share


def _legend(axis: Axis, left: float, right: float, top: float) -> str:
    """The colors of a map from the least to the greatest value, with the numbers of the ticks below."""
    width = right - left - 2
    marks = [
        '<linearGradient id="shades">'
        f'<stop class="shade" offset="0" stop-opacity="{_shade(0):.2f}"/><stop class="shade" offset="1"/>'
        f'</linearGradient><rect fill="url(#shades)" x="{left}" y="{top}" width="{width}" height="{_LEGEND_PX}"/>'
    ]
    for tick in axis.ticks:
        x = left + axis.share(tick) * width
        marks.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{top + _LEGEND_PX}" y2="{top + 18}"/>')
        marks.append(f'<text text-anchor="middle" x="{x:.1f}" y="{top + 28}">{_number(tick)}</text>')
    return "".join(marks)
