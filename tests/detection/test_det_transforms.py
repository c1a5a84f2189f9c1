"""Boxes and masks follow the image: checked on images whose pixels tell where they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from vizoo.train.detection import samples
from vizoo.train.detection.samples import Sample, crop, fit_boxes, flip, pad, resize, select, tidy
from vizoo.train.detection.transforms import (
    SHORT_SIDES,
    CopyPaste,
    DetectionTransform,
    JitterTransform,
    ResizeCropTransform,
    ResizeTransform,
)
from vizoo.train.geometry import fit
from vizoo.train.transforms import build_transform


def scene(height: int = 90, width: int = 120, count: int = 3, masks: bool = True) -> Sample:
    """Rectangles, each bright in the channel of its number: the image tells what a box or mask should cover."""
    rng = np.random.default_rng(count)
    image = np.zeros((height, width, 3), np.uint8)
    boxes, layers = [], []
    for number in range(count):
        w, h = width // (count + 1), height // 2
        x, y = number * (width // count), int(rng.integers(0, height - h))
        image[y : y + h, x : x + w, number % 3] = 255
        layer = np.zeros((height, width), np.uint8)
        layer[y : y + h, x : x + w] = 1
        boxes.append((x, y, x + w, y + h))
        layers.append(layer)
    found = np.array(layers, np.uint8).reshape(-1, height, width)
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(count), found if masks else None)


def check(sample: Sample, tolerance: float = 1.5) -> None:
    """Every box and mask lies on the colour of its object. The fill is brighter than nothing, darker than half."""
    height, width = sample.size
    assert sample.boxes.dtype == np.float32
    assert sample.image.dtype == np.uint8
    assert len(sample.boxes) == len(sample.labels)
    assert (sample.boxes >= 0).all()
    assert (sample.boxes <= [width, height, width, height]).all()
    for place, (box, label) in enumerate(zip(sample.boxes, sample.labels, strict=True)):
        colour = sample.image[:, :, label] > 127
        assert np.abs(fit_boxes(colour[None])[0] - box).max() <= tolerance
        if sample.masks is not None:
            assert sample.masks.shape == (len(sample.labels), height, width)
            mask = sample.masks[place] > 0
            # The nearest pixel may lie one pixel off on each side.
            assert np.abs(fit_boxes(mask[None]) - fit_boxes(colour[None])).max() <= tolerance
            x1, y1, x2, y2 = fit_boxes(mask[None])[0]
            assert mask.sum() == (x2 - x1) * (y2 - y1), "a rectangle stays one"


# -- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),
        (640, 480, (1067, 800)),
        (427, 640, (800, 1199)),
        (100, 400, (333, 1333)),
        (5, 5, (800, 800)),
    ],
)
def test_sizes_of_the_official_test_resize(height: int, width: int, expected: tuple[int, int]) -> None:
    assert fit(height, width, 1333, 800) == expected


@pytest.mark.parametrize(("height", "width"), [(10, 10000), (10000, 10), (3, 10000), (1, 1000)])
def test_extreme_shapes_keep_a_pixel(height: int, width: int) -> None:
    sample = Sample(np.zeros((height, width, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    for transform in (ResizeTransform(), ResizeCropTransform(), JitterTransform(size=64)):
        for _ in range(4):
            assert min(transform(sample).size) >= 1
    assert max(ResizeTransform()(sample).size) == 1333


def test_resizing_is_opencvs_and_boxes_take_the_factor_of_their_axis() -> None:
    sample = scene(37, 53)
    found = resize(sample, 80, 115)
    assert np.array_equal(found.image, cv2.resize(sample.image, (115, 80), interpolation=cv2.INTER_LINEAR))
    assert np.allclose(found.boxes, sample.boxes * [115 / 53, 80 / 37, 115 / 53, 80 / 37], rtol=1e-6)
    check(found)


def test_flipping_twice_changes_nothing() -> None:
    sample = scene(width=121)
    once = flip(sample)
    check(once)
    twice = flip(once)
    assert np.array_equal(twice.image, sample.image)
    assert np.array_equal(twice.boxes, sample.boxes)
    assert twice.masks is not None
    assert np.array_equal(twice.masks, sample.masks)


def test_crops_drop_what_they_leave_outside() -> None:
    sample = scene()
    x1, y1, x2, _ = sample.boxes[1].astype(int)
    found = crop(sample, y1, x1 - 4, 20, x2 - x1 + 8)
    assert found.labels.tolist() == [1]
    assert found.boxes.tolist() == [[4, 0, 4 + x2 - x1, 20]]
    check(found)
    assert len(crop(sample, 0, x1 - 4, 2, 2).labels) == 0


def test_padding_adds_nothing_to_objects() -> None:
    found = pad(scene(), 100, 140)
    assert found.size == (100, 140)
    assert found.image[-1, -1].tolist() == list(samples.FILL)
    check(found)
    assert pad(found, 100, 140) is found


def test_objects_without_extent_or_pixels_go_with_all_they_have() -> None:
    sample = scene(count=4)
    assert sample.masks is not None
    sample.boxes[0] = (5, 5, 5, 9)
    sample.boxes[2] = (130, 5, 150, 9)
    sample.masks[3] = 0
    found = tidy(sample)
    assert found.labels.tolist() == [1]
    assert found.masks is not None
    assert found.masks.shape[0] == 1
    assert tidy(replace(sample, masks=None)).labels.tolist() == [1, 3]


def test_boxes_around_masks() -> None:
    sample = scene()
    assert sample.masks is not None
    assert np.array_equal(fit_boxes(sample.masks), sample.boxes)


# -- pipelines -----------------------------------------------------------------------------------------------------

PIPELINES: list[Callable[[], DetectionTransform]] = [
    lambda: ResizeTransform(short=60, long=100, hflip=0.5),
    lambda: ResizeCropTransform(short=(70, 80, 90), long=140, crop_short=(60, 90), crop=(50, 70)),
    lambda: JitterTransform(size=96, ratio=(0.5, 1.6)),
]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("masks", [True, False])
def test_objects_follow_the_image(place: int, masks: bool) -> None:
    transform = PIPELINES[place]()
    counts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = transform(scene(masks=masks))
        counts.add(len(found.labels))
        check(found, tolerance=2.5)
    assert max(counts) == 3


@pytest.mark.parametrize("place", range(3))
def test_images_without_objects(place: int) -> None:
    for masks in (True, False):
        found = PIPELINES[place]()(empty(masks))
        assert found.boxes.shape == (0, 4)
        assert found.masks is None or found.masks.shape == (0, *found.size)


def empty(masks: bool) -> Sample:
    return select(scene(masks=masks), np.zeros(0, np.int64))


def test_draws_follow_torchs_generator_alone() -> None:
    transform = ResizeCropTransform(short=(48, 56, 64), crop_short=(50, 70), crop=(30, 60))
    for seed in range(5):
        torch.manual_seed(seed)
        first = transform(scene())
        np.random.seed(seed + 1)  # noqa: NPY002 -- it must not matter
        torch.manual_seed(seed)
        again = transform(scene())
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.boxes, again.boxes)


def test_the_swin_recipe() -> None:
    """Both ways, all short sides, and crops of 384 to 600 pixels."""
    sizes, cropped = [], 0
    transform = ResizeCropTransform()
    image = np.zeros((480, 640, 3), np.uint8)
    sample = Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    for _ in range(300):
        found = transform(sample).size
        sizes.append(min(found))
        cropped += abs(found[1] / found[0] - 640 / 480) > 0.01
        assert max(found) <= 1333
    assert {size for size in sizes if size in SHORT_SIDES} == set(SHORT_SIDES)
    assert 110 < cropped < 190
    windows = [transform._crop(sample).size for _ in range(300)]
    heights, widths = zip(*windows, strict=True)
    assert 384 <= min(heights) < 400
    assert 460 < max(heights) <= 480
    assert 384 <= min(widths) < 400
    assert 580 < max(widths) <= 600


def test_the_plain_recipe_flips_half_of_the_images() -> None:
    transform = ResizeTransform(short=90, long=200, hflip=0.5)
    sample = scene()
    flipped = sum(not np.array_equal(transform(sample).boxes, sample.boxes) for _ in range(200))
    assert 70 < flipped < 130
    still = ResizeTransform(short=90, long=200)
    assert all(np.array_equal(still(sample).image, sample.image) for _ in range(5))


def test_jitter_gives_squares_of_many_scales() -> None:
    transform = JitterTransform(size=64, ratio=(0.1, 2.0), hflip=0.0)
    found = [transform(scene()) for _ in range(60)]
    assert {sample.size for sample in found} == {(64, 64)}
    heights = [box[3] - box[1] for sample in found for box in sample.boxes]
    assert min(heights) < 10
    assert max(heights) > 40


def test_albumentations_take_boxes_and_masks_along() -> None:
    specs = [{"type": "Affine", "translate_percent": (0.5, 0.5), "scale": (0.8, 0.8), "p": 1.0}]
    transform = DetectionTransform(extra=specs)
    found = transform(scene())
    assert 0 < len(found.labels) < 3, "one object leaves the image, with its mask"
    check(found, tolerance=2.5)
    colours = DetectionTransform(extra=[{"type": "ColorJitter", "p": 1.0}])
    sample = scene(masks=False)
    assert np.allclose(colours(sample).boxes, sample.boxes, atol=1e-3)
    nothing = colours(empty(masks=True))
    assert nothing.masks is not None
    assert nothing.masks.shape == (0, 90, 120)


def test_configs() -> None:
    made: Any = build_transform({"type": ResizeCropTransform, "short": [32, 64], "extra": [{"type": "CLAHE"}]})
    assert made.short == (32, 64)
    assert made(scene()).image.ndim == 3


# -- copy-paste ----------------------------------------------------------------------------------------------------


def one(box: tuple[int, int, int, int], label: int) -> Sample:
    mask = np.zeros((40, 60), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :, label] = 255 * mask
    return Sample(image, np.array([box], np.float32), np.array([label]), mask[None])


def test_pasted_objects_hide_what_lies_below() -> None:
    found = CopyPaste()(one((10, 10, 30, 30), 0), one((20, 5, 50, 35), 1))
    assert found.labels.tolist() == [0, 1]
    assert found.boxes.tolist() == [[10, 10, 20, 30], [20, 5, 50, 35]]
    check(found)


def test_objects_that_are_all_but_hidden_go() -> None:
    below, above = one((10, 10, 30, 30), 0), one((11, 5, 50, 35), 1)
    assert CopyPaste(min_visible=0.1)(below, above).labels.tolist() == [1]
    assert CopyPaste(min_visible=0.04)(below, above).labels.tolist() == [0, 1]
    whole = one((10, 10, 30, 30), 1)
    assert CopyPaste(min_visible=0.0)(below, whole).labels.tolist() == [1]


def test_pasting_from_smaller_larger_and_empty_images() -> None:
    sample = one((30, 20, 50, 38), 0)
    small = crop(one((2, 2, 12, 12), 1), 0, 0, 20, 20)
    for other in (small, pad(one((2, 2, 12, 12), 1), 70, 90)):
        found = CopyPaste()(sample, other)
        assert found.size == (40, 60)
        assert found.labels.tolist() == [0, 1]
        check(found)
    nothing = select(sample, np.zeros(0, np.int64))
    assert CopyPaste()(sample, nothing) is sample


def test_the_number_of_pasted_objects() -> None:
    counts = [len(CopyPaste(max_objects=2)(one((0, 0, 1, 1), 0), scene(40, 60)).labels) for _ in range(60)]
    assert set(counts) <= {1, 2, 3}
    assert max(counts) == 3


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResizeTransform(hflip=1.5), r"hflip must lie in \[0, 1\], got 1.5"),
        (lambda: ResizeTransform(short=0), "short must be 1 pixel or more, got 0"),
        (lambda: ResizeTransform(short=()), r"short must be 1 pixel or more, got \(\)"),
        (lambda: ResizeTransform(long=-1), "long must be 1 pixel or more, got -1"),
        (lambda: ResizeCropTransform(crop=(600, 384)), r"crop must be \(least, greatest\) side in pixels"),
        (lambda: ResizeCropTransform(crop_short=0), "crop_short must be 1 pixel or more, got 0"),
        (lambda: ResizeCropTransform(crop_prob=2), r"crop_prob must lie in \[0, 1\], got 2"),
        (lambda: JitterTransform(size=0), "size must be 1 pixel or more, got 0"),
        (lambda: JitterTransform(ratio=(2, 1)), r"ratio must be a range .*, got \(2, 1\)"),
        (lambda: CopyPaste(prob=-1), r"prob must lie in \[0, 1\], got -1"),
        (lambda: CopyPaste(min_visible=7), r"min_visible must lie in \[0, 1\], got 7"),
        (lambda: CopyPaste(max_objects=0), "max_objects must be 1 or more, or None, got 0"),
        (lambda: ResizeTransform(extra=[{"type": "ColourJitter"}]), "albumentations has no transform 'ColourJitter'"),
        (
            lambda: CopyPaste()(scene(masks=False), scene()),
            "copy-paste needs masks: build the data set with masks=True",
        ),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
