"""Draws curves and a color map as SVG for the report; their colors come from the style sheet in report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 640, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 14, 58
_CURVE_POINTS = 600  # a longer curve is thinned out to about as many; more would not be visible
_MAX_TICKS = 7  # on an axis, not counting those that widen it
_MIN_LOG_RATIO = 3.0  # greatest over least value below which a logarithmic axis gets evenly spaced ticks
_CELL_WIDTH, _CELL_HEIGHT, _LEGEND_PX = 40, 34, 12


class Axis:
    """A linear or logarithmic axis: its range, its ticks, and the position of a value along it."""

    def __init__(
        self, values: Sequence[float], *, logarithmic: bool = False, widen: bool = True, integers: bool = False
    ) -> None:
        """Make an axis that spans `values`, which must be finite, and positive if `logarithmic`.

        widen: extend the axis to the next tick at both ends. integers: place ticks at whole numbers only.
        """
        low, high = min(values), max(values)
        if high == low:
            low, high = (low / 2, high * 2) if logarithmic else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self._logarithmic = logarithmic
        ticks = (
            _log_ticks(low, high)
            if logarithmic and high / low >= _MIN_LOG_RATIO
            else _linear_ticks(low, high, integers)
        )
        if logarithmic:
            ticks = [tick for tick in ticks if tick > 0]
        if widen:
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        self.low, self.high = low, high
        self.ticks = [tick for tick in ticks if low <= tick <= high]

    def fraction(self, value: float) -> float:
        """Return the position of a value: 0 at the low end of the axis, 1 at the high end."""
        low, high, x = (math.log(v) if self._logarithmic else v for v in (self.low, self.high, value))
        return (x - low) / (high - low)


def _linear_ticks(low: float, high: float, integers: bool) -> list[float]:
    """Return the multiples of a step of 1, 2 or 5 x 10^k that cover `low` to `high`."""
    min_step = (high - low) / (_MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= min_step * (1 - 1e-9))
    step = max(step, 1.0) if integers else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 x 10^k that cover `low` to `high`; only 10^k, or every n-th, if there are many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1,)):
        numbers = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [x for x, after in pairwise(numbers) if after > low] + numbers[-1:]
        ticks = [x for before, x in pairwise([0.0, *ticks]) if before < high]
        if len(ticks) <= _MAX_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / (_MAX_TICKS + 1))]


def curve(
    name: str,
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    x_label: str = "step",
    smooth: int = 1,
    logarithmic: bool = False,
    dots: bool = False,
) -> str:
    """Draw ys over ascending xs: their mean over the last `smooth` points and, if smooth > 1, the points faintly.

    Values that are not finite are left out, and so are those that are not positive if `logarithmic`. dots: mark each
    point.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not logarithmic)]
    if not points:
        return f'<figure><figcaption>{escape(name)}</figcaption><p class="empty">nothing yet</p></figure>'
    x_axis = Axis([x for x, _ in points], widen=False, integers=True)
    y_axis = Axis([y for _, y in points], logarithmic=logarithmic)
    means = _moving_average([y for _, y in points], smooth, logarithmic)
    marks = _line("strong", [(x, y) for (x, _), y in zip(points, means, strict=True)], x_axis, y_axis)
    if smooth > 1:
        name += f", and its mean over {smooth} steps"
        marks = _line("faint", points, x_axis, y_axis) + marks
    if dots:
        marks += "".join(
            f'<circle cx="{_x(x, x_axis):.1f}" cy="{_y(y, y_axis):.1f}" r="4"><title>{x_label} {x:g}: {y:.4g}</title>'
            "</circle>"
            for x, y in points
        )
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(name)} by {escape(x_label)}">{_axes(x_axis, y_axis, x_label)}{marks}</svg></figure>'
    )


def _x(value: float, axis: Axis) -> float:
    return _LEFT + axis.fraction(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _TOP + (1 - axis.fraction(value)) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """Draw a horizontal line at each tick of y, a short mark at each tick of x, their numbers, and the label of x."""
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
    marks.append(f'<text x="{middle}" y="{foot + 42}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(marks)


def _number(value: float) -> str:
    """Format the number of a tick, without leading zeros in the exponent."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def _line(kind: str, points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    thin = points[:: max(1, len(points) // _CURVE_POINTS)]
    coordinates = " ".join(f"{_x(x, x_axis):.1f},{_y(y, y_axis):.1f}" for x, y in [*thin, points[-1]])
    return f'<polyline class="{kind}" points="{coordinates}"/>'


def _moving_average(values: Sequence[float], width: int, geometric: bool) -> list[float]:
    """Return the mean of each value and up to width - 1 values before it; geometric: the geometric mean."""
    scaled = [math.log(value) for value in values] if geometric else values
    total, means = 0.0, []
    for k, value in enumerate(scaled):
        total += value - (scaled[k - width] if k >= width else 0.0)
        mean = total / min(k + 1, width)
        means.append(math.exp(mean) if geometric else mean)
    return means


def color_map(values: Sequence[Sequence[float]], labels: Sequence[str], x_label: str, y_label: str) -> str:
    """Draw a square for each value [rows][columns], darker for a greater value on a logarithmic scale, none for NaN.

    labels: of the rows, and of the columns, such as "0-99".
    """
    positive = [value for row in values for value in row if value > 0]
    axis = Axis(positive or [1.0], logarithmic=True, widen=False)
    left, top = 84, 8
    bottom, right = top + len(values) * _CELL_HEIGHT, left + len(labels) * _CELL_WIDTH
    marks = []
    for i, row in enumerate(values):
        y = top + i * _CELL_HEIGHT
        marks.append(f'<text class="left" x="{left - 8}" y="{y + _CELL_HEIGHT / 2}">{labels[i]}</text>')
        for j, value in enumerate(row):
            if not math.isnan(value):
                fraction = axis.fraction(value) if value > 0 and len(set(positive)) > 1 else 0.0
                marks.append(
                    f'<rect class="cell" x="{left + j * _CELL_WIDTH}" y="{y}" width="{_CELL_WIDTH - 2}" '
                    f'height="{_CELL_HEIGHT - 2}" fill-opacity="{_opacity(fraction):.2f}">'
                    f"<title>{y_label} {labels[i]}, {x_label} {labels[j]}: {value:.4g}</title></rect>"
                )
    for j, label in enumerate(labels):
        start = label.partition("-")[0]
        x = left + (j + 0.5) * _CELL_WIDTH
        marks.append(f'<text text-anchor="middle" x="{x}" y="{bottom + 12}">{start}</text>')
    marks.append(f'<text text-anchor="middle" x="{(left + right) / 2}" y="{bottom + 34}">{x_label}</text>')
    if len(set(positive)) > 1:
        marks.append(_legend(axis, left, right, bottom + 58))
    return (
        f'<figure class="map"><figcaption>mean loss: {y_label} down, {x_label} across</figcaption>'
        f'<svg viewBox="0 0 {right + 24} {bottom + 100}" role="img" aria-label="loss by {y_label} and {x_label}">'
        f"{''.join(marks)}</svg></figure>"
    )


def _opacity(fraction: float) -> float:
    return 0.08 + 0.92 * fraction


def _legend(axis: Axis, left: float, right: float, top: float) -> str:
    """Draw a bar with the colors from the least to the greatest value, and the numbers of the ticks below it."""
    width = right - left - 2
    marks = [
        '<linearGradient id="shades">'
        f'<stop class="shade" offset="0" stop-opacity="{_opacity(0):.2f}"/><stop class="shade" offset="1"/>'
        f'</linearGradient><rect fill="url(#shades)" x="{left}" y="{top}" width="{width}" height="{_LEGEND_PX}"/>'
    ]
    for tick in axis.ticks:
        x = left + axis.fraction(tick) * width
        marks.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{top + _LEGEND_PX}" y2="{top + 18}"/>')
        marks.append(f'<text text-anchor="middle" x="{x:.1f}" y="{top + 28}">{_number(tick)}</text>')
    return "".join(marks)
