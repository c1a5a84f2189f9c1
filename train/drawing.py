"""Drawing what was found onto images: boxes with masks and labels, or colours of classes with a legend.

Lines and letters grow with the image, and letters are black or white, whichever reads better on their ground.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .segmentation.classes import palette

MASK_SHARE, MAP_SHARE = 0.45, 0.6
"""Share of the colour in the pixels of an object, and of a class."""

MIN_LETTERS = 11
"""Least height of letters in pixels."""

Array = np.ndarray
Colour = tuple[int, int, int]


def draw_objects(
    image: Image.Image, boxes: Array, scores: Array, labels: Array, masks: Array | None, classes: Sequence[str]
) -> Image.Image:
    """An image with its objects, the surest ones on top.

    Args:
        image: RGB.
        boxes: x1, y1, x2, y2 in pixels (n, 4).
        scores: (n,).
        labels: Places in `classes` (n,).
        masks: The objects' pixels (n, height, width), bool; None draws boxes alone.
        classes: A name per label.
    """
    colours = palette(classes)
    width = line_width(image)
    order = np.argsort(scores, kind="stable")
    if masks is not None:
        image = _with_masks(image, ((masks[place], colours[labels[place]]) for place in order), width)
    drawn = image.copy()
    pen, font = ImageDraw.Draw(drawn), _font(image)
    for place in order:
        pen.rectangle(_ordered(boxes[place]), outline=_rgb(colours[labels[place]]), width=width)
    for place in order:
        text = f"{classes[labels[place]]} {scores[place]:.2f}"
        _write_label(pen, text, boxes[place], _rgb(colours[labels[place]]), font, drawn.size)
    return drawn


def draw_map(image: Image.Image, labels: Array, classes: Sequence[str]) -> Image.Image:
    """An image with the colour of each pixel's class laid over it; below, the classes that are there.

    Args:
        image: RGB.
        labels: Places in `classes` (height, width); others are left as they are.
        classes: A name per label.
    """
    colours = palette(classes)
    pixels = np.array(image)
    known = labels < len(classes)
    pixels[known] = _mixed(pixels[known], colours[labels[known]], MAP_SHARE)
    counts = np.bincount(labels[known].ravel(), minlength=len(classes))
    there = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    entries = [(f"{classes[label]} {counts[label] / labels.size:.1%}", _rgb(colours[label])) for label in there]
    return _with_legend(Image.fromarray(pixels), entries)


def line_width(image: Image.Image) -> int:
    """Width of lines in pixels."""
    return max(1, round(min(image.size) / 250))


def contrast(colour: Colour) -> str:
    """`black` or `white`, whichever is easier to read on the colour."""
    # Luminance by the weights of ITU-R BT.601.
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else "white"


def _with_masks(image: Image.Image, masks: Iterable[tuple[Array, Array]], width: int) -> Image.Image:
    pixels = np.array(image)
    for mask, colour in masks:
        rows, columns = np.any(mask, axis=1).nonzero()[0], np.any(mask, axis=0).nonzero()[0]
        if not len(rows):
            continue
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside, part = mask[window], pixels[window]
        part[inside] = _mixed(part[inside], colour, MASK_SHARE)
        part[_rim(inside, width)] = colour
    return Image.fromarray(pixels)


def _rim(mask: Array, width: int) -> Array:
    """Pixels of a mask (height, width) that are at most `width` away, along an axis, from one outside it."""
    padded = np.pad(mask, width)
    height, length = mask.shape
    core = mask.copy()
    for shift in range(2 * width + 1):
        core &= padded[shift : shift + height, width : width + length]
        core &= padded[width : width + height, shift : shift + length]
    rim: Array = mask & ~core
    return rim


def _mixed(pixels: Array, colour: Array, share: float) -> Array:
    mixed: Array = np.rint((1 - share) * pixels + share * colour).astype(np.uint8)
    return mixed


def _ordered(box: Array) -> tuple[float, float, float, float]:
    """A box whose last pixel is inside it, as Pillow draws; one without extent stays a point."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _write_label(
    pen: ImageDraw.ImageDraw, text: str, box: Array, colour: Colour, font: Any, size: tuple[int, int]
) -> None:
    """A name above the box, or inside it where there is no space above; moved to stay in the image."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = max(1, (bottom - top) // 6)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(float(box[0]), size[0] - width))
    y = float(box[1]) - height
    y = max(0, min(y if y >= 0 else float(box[1]), size[1] - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    pen.text((x + margin - left, y + margin - top), text, fill=contrast(colour), font=font)


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """An image with a line per entry below it, in as many columns as fit."""
    font, pen = _font(image), ImageDraw.Draw(image)
    line = round(1.5 * font.size)
    column = round(max((pen.textlength(text, font=font) for text, _ in entries), default=0)) + 2 * line
    columns = max(1, image.width // column)
    rows = -(-len(entries) // columns)
    whole = Image.new("RGB", (max(image.width, column), image.height + rows * line), "white")
    whole.paste(image)
    pen = ImageDraw.Draw(whole)
    for number, (text, colour) in enumerate(entries):
        x, y = number // rows * column, image.height + number % rows * line
        gap = line // 5
        pen.rectangle((x + gap, y + gap, x + line - gap, y + line - gap), fill=colour, outline="black")
        pen.text((x + line + gap, y + line / 2), text, fill="black", font=font, anchor="lm")
    return whole


def _font(image: Image.Image) -> Any:
    return ImageFont.load_default(max(MIN_LETTERS, round(min(image.size) / 35)))


def _rgb(colour: Array) -> Colour:
    red, green, blue = (int(value) for value in colour)
    return red, green, blue
