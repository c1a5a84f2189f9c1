"""Charts of a report as inline SVG, and images as data: small functions that return safe markup.

Colours come from the page's style sheet by class, so that a chart follows the light or the dark theme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

HEAT_STOPS = ((120, 40, 140), (214, 60, 110), (250, 130, 50), (255, 214, 70))
"""Colours of heat from little to much; their lightness rises evenly, so they read without colour vision too."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What the legend calls it.
        x: Positions.
        y: Values.
        style: Class of the style sheet: `one`, `two` or `goal`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "one"


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value, the value as text, and a class of the style sheet."""

    name: str
    value: float
    text: str
    style: str = "one"


def join(parts: Sequence[Markup]) -> Markup:
    """Markup one behind the other."""
    return Markup("\n").join(parts)


def png_uri(image: NDArray[np.uint8], scale: int = 1) -> str:
    """An image (H, W) or (H, W, 3) as a data URI; `scale` repeats each pixel so many times along both axes."""
    enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(enlarged).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: NDArray[np.uint8], alt: str, style: str = "pixels") -> Markup:
    """An image element; `alt` says what is on it."""
    return Markup('<img class="{}" src="{}" alt="{}"/>').format(style, png_uri(image), alt)


def heat_overlay(image: NDArray[np.uint8], heat: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of heat (H, W) in 0..1 over a dimmed gray image (H, W): opaque where hot, clear where cold."""
    stops = np.asarray(HEAT_STOPS, dtype=np.float64)
    place = np.clip(heat, 0, 1) * (len(stops) - 1)
    colour = np.stack([np.interp(place, range(len(stops)), stops[:, c]) for c in range(3)], axis=-1)
    gray = image.astype(np.float64)[..., None] * 0.55
    opacity = 0.9 * np.clip(heat, 0, 1)[..., None] ** 0.7
    return (colour * opacity + gray * (1 - opacity)).round().astype(np.uint8)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low..high, about `count` of them, evenly spaced."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil((low + span) / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where data lands inside a chart of `width` x `height` user units."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    width: float = 360
    height: float = 230
    left: float = 46
    bottom: float = 34
    top: float = 10
    right: float = 12

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 2)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.bottom - self.top), 2
        )


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str = "epoch", form: Callable[[float], str] = "{:g}".format
) -> Markup:
    """Lines over one pair of axes, a legend that gives each line's last value, and a tooltip at every point.

    Args:
        lines: The lines, each with at least one point.
        title: Caption of the chart.
        x_label: Name of the horizontal axis.
        form: Writes a value of the vertical axis.
    """
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    frame = _Frame(nice_ticks(0, max(xs)), nice_ticks(min(ys), max(ys)))
    drawn = [_axes(frame, x_label, form), *(_path(frame, line, form) for line in lines)]
    legend = join([_legend(line, form) for line in lines])
    told = "; ".join(f"{line.name} ends at {form(line.y[-1])}" for line in lines)
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg><p class="legend">{}</p></figure>'
    ).format(title, frame.width, frame.height, f"{title}: {told}", join(drawn), legend)


def _axes(frame: _Frame, x_label: str, form: Callable[[float], str]) -> Markup:
    left, right, base = frame.left, frame.width - frame.right, frame.height - frame.bottom
    parts = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick end" x="{}" y="{}">{}</text>'
        ).format(left, right, frame.y(tick), frame.y(tick), left - 7, frame.y(tick) + 4, form(tick))
        for tick in frame.y_ticks
    ]
    parts += [
        Markup('<text class="tick mid" x="{}" y="{}">{:g}</text>').format(frame.x(tick), base + 16, tick)
        for tick in frame.x_ticks
    ]
    parts.append(
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format((left + right) / 2, base + 31, x_label)
    )
    return join(parts)


def _path(frame: _Frame, line: Line, form: Callable[[float], str]) -> Markup:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    track = " ".join(f"{x},{y}" for x, y in points)
    parts = [Markup('<polyline class="line {}" points="{}"/>').format(line.style, track)]
    if line.style != "goal":
        parts += [
            Markup('<circle class="hover {}" cx="{}" cy="{}" r="5"><title>{}</title></circle>').format(
                line.style, px, py, f"{line.name}, {x:.3g}: {form(y)}"
            )
            for (px, py), x, y in zip(points, line.x, line.y, strict=True)
        ]
    return join(parts)


def _legend(line: Line, form: Callable[[float], str]) -> Markup:
    return Markup('<span><i class="key {}"></i>{} <b>{}</b></span>').format(line.style, line.name, form(line.y[-1]))


def bar_row(bar: Bar, top: float) -> Markup:
    """One horizontal bar; `top` is the value that fills the row."""
    track = Markup('<span class="track"><i class="{}" style="width:{:.1f}%"></i></span>').format(
        bar.style, 100 * bar.value / top
    )
    return Markup('<div class="bar"><span>{}</span>{}<b>{}</b></div>').format(bar.name, track, bar.text)


def bar_chart(bars: Sequence[Bar], *, title: str) -> Markup:
    """Horizontal bars from zero, one a row, with their values as text."""
    top = max((bar.value for bar in bars), default=0) or 1
    rows = [bar_row(bar, top) for bar in bars]
    return Markup('<figure class="bars"><figcaption>{}</figcaption>{}</figure>').format(title, join(rows))


def confusion_chart(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """A confusion matrix as a heat map: rows are true classes, columns answers; mistakes have a colour of their own."""
    size, cell, edge = len(classes), 38, 64
    cells = [
        _confusion_cell(matrix[row], row, column, classes, (edge + column * cell, edge + row * cell, cell))
        for row in range(size)
        for column in range(size)
    ]
    names = [
        Markup('<text class="tick end" x="{}" y="{}">{}</text><text class="tick mid" x="{}" y="{}">{}</text>').format(
            edge - 8, edge + (i + 0.5) * cell + 4, name, edge + (i + 0.5) * cell, edge - 9, name
        )
        for i, name in enumerate(classes)
    ]
    middle, side = edge + size * cell / 2, edge + size * cell + 4
    right = sum(matrix[i][i] for i in range(size))
    told = f"Confusion matrix of {size} classes: {right} of {sum(map(sum, matrix))} images on the diagonal"
    axes = Markup(
        '<text class="tick mid" x="{0}" y="26">the model says</text>'
        '<text class="tick mid" x="16" y="{0}" transform="rotate(-90 16 {0})">it is</text>'
    ).format(middle)
    return Markup('<svg class="confusion" viewBox="0 0 {0} {0}" role="img" aria-label="{1}">{2}{3}{4}</svg>').format(
        side, told, axes, join(names), join(cells)
    )


def _confusion_cell(
    counts: Sequence[int], row: int, column: int, classes: Sequence[str], place: tuple[float, float, float]
) -> Markup:
    x, y, cell = place
    count, share = counts[column], counts[column] / max(sum(counts), 1)
    style = "empty" if count == 0 else "right" if row == column else "wrong"
    # Mistakes are few: the square root shows a single one, and half of full colour is the least.
    opacity = 1.0 if count == 0 else 0.35 + 0.65 * math.sqrt(share) if style == "wrong" else 0.25 + 0.75 * share
    text = Markup('<text class="count {}" x="{}" y="{}">{}</text>').format(
        style, x + cell / 2, y + cell / 2 + 4.5, count or ""
    )
    return Markup(
        '<g><title>{}</title><rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="4" fill-opacity="{:.2f}"/>{}</g>'
    ).format(
        f"{count} of {sum(counts)} images of {classes[row]} are read as {classes[column]}",
        style,
        x + 1.5,
        y + 1.5,
        cell - 3,
        cell - 3,
        opacity,
        text if count else "",
    )


def glyph_map(
    points: NDArray[np.floating], labels: Sequence[int], wrong: Sequence[bool], classes: Sequence[str], *, told: str
) -> Markup:
    """Points (N, 2) of a plane, each drawn as the name of its class; those answered wrongly are ringed."""
    width, height, margin = 720, 460, 18
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (points - low) / np.where(high > low, high - low, 1)
    drawn = []
    for (u, v), label, is_wrong in zip(unit, labels, wrong, strict=True):
        x, y = round(margin + u * (width - 2 * margin), 1), round(margin + v * (height - 2 * margin), 1)
        ring = Markup('<circle class="ring" cx="{}" cy="{}" r="9"/>').format(x, y) if is_wrong else Markup()
        glyph = Markup('<text class="glyph" style="fill:hsl({} var(--glyph))" x="{}" y="{}">{}</text>').format(
            round(360 * label / len(classes)), x, y + 4, classes[label]
        )
        drawn.append(ring + glyph)
    return Markup('<svg class="plane" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, told, join(drawn)
    )
