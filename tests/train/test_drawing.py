"""What is drawn onto images: where, in which colours, at which size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vizoo.train.drawing import contrast, draw_map, draw_objects, line_width
from vizoo.train.segmentation.classes import palette

CLASSES = ("ant", "bee", "cat")
GRAY = (100, 100, 100)


def gray(width: int = 200, height: int = 120) -> Image.Image:
    return Image.new("RGB", (width, height), GRAY)


def objects(*boxes: tuple[float, float, float, float]) -> dict[str, np.ndarray]:
    count = len(boxes)
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "scores": np.linspace(0.9, 0.5, count, dtype=np.float32),
        "labels": np.arange(count) % len(CLASSES),
    }


def test_a_box_is_outlined_in_the_colour_of_its_class_and_named() -> None:
    image = gray()
    drawn = np.asarray(draw_objects(image, **objects((20, 60, 120, 110)), masks=None, classes=CLASSES))
    colour = palette(CLASSES)[0]
    for row, column in ((60, 70), (109, 70), (80, 20), (80, 119)):
        assert (drawn[row, column] == colour).all(), (row, column)
    assert (drawn[85, 70] == GRAY).all()
    label = drawn[44:59, 20:60]
    assert (label == colour).all(2).any()
    letters = 255 if contrast((*map(int, colour),)) == "white" else 0
    assert abs(label.astype(int) - letters).max(2).min() < 100  # thin strokes only come close to black or white
    assert (np.asarray(image) == GRAY).all()  # the original is left alone


def test_masks_are_blended_with_a_rim() -> None:
    mask = np.zeros((1, 120, 200), bool)
    mask[0, 40:100, 30:110] = True
    found = objects((30, 40, 110, 100))
    drawn = np.asarray(draw_objects(gray(), **found, masks=mask, classes=CLASSES)).astype(int)
    colour = palette(CLASSES)[0].astype(int)
    inside = drawn[70, 70]
    assert (abs(inside - (0.55 * 100 + 0.45 * colour)) <= 1).all()
    assert (drawn[70, 30] == colour).all()
    assert (drawn[70, 115] == GRAY).all()


@pytest.mark.parametrize("box", [(0, 0, 200, 120), (195, 118, 200, 120), (50, 50, 50, 50), (0, 0, 1, 1)])
def test_boxes_at_borders_and_without_extent(box: tuple[float, float, float, float]) -> None:
    drawn = np.asarray(draw_objects(gray(), **objects(box), masks=np.zeros((1, 120, 200), bool), classes=CLASSES))
    assert drawn.shape == (120, 200, 3)
    assert (drawn == palette(CLASSES)[0]).all(2).sum() > 50  # the name is in the image, wherever the box is


def test_nothing_found_leaves_the_image() -> None:
    assert (np.asarray(draw_objects(gray(), **objects(), masks=None, classes=CLASSES)) == GRAY).all()


def test_the_surest_object_is_on_top() -> None:
    drawn = np.asarray(draw_objects(gray(), **objects((40, 40, 90, 90), (40, 40, 90, 90)), masks=None, classes=CLASSES))
    assert (drawn[89, 60] == palette(CLASSES)[0]).all()


def test_lines_grow_with_the_image() -> None:
    widths = [line_width(Image.new("RGB", (side, side))) for side in (10, 500, 2000)]
    assert widths == [1, 2, 8]


def test_letters_contrast_with_their_ground() -> None:
    assert contrast((255, 255, 0)) == "black"
    assert contrast((0, 0, 255)) == "white"


def test_a_map_is_blended_and_has_a_legend_of_what_is_there() -> None:
    labels = np.zeros((120, 200), np.uint8)
    labels[:, 100:] = 2
    labels[0, 0] = 255
    drawn = np.asarray(draw_map(gray(), labels, CLASSES)).astype(int)
    assert drawn.shape[1] == 200
    assert drawn.shape[0] > 120
    colours = palette(CLASSES).astype(int)
    for column, label in ((50, 0), (150, 2)):
        assert (abs(drawn[60, column] - (0.4 * 100 + 0.6 * colours[label])) <= 1).all()
    assert (drawn[0, 0] == GRAY).all()
    legend = drawn[120:]
    assert [(legend == colour).all(2).any() for colour in colours] == [True, False, True]


def test_the_legend_of_a_small_image_is_readable() -> None:
    drawn = draw_map(gray(8, 6), np.arange(48, dtype=np.uint8).reshape(6, 8) % 3, CLASSES)
    assert drawn.width > 60
    assert drawn.height > 6 + 3 * 11
