"""An image with its objects, and the steps that change both together; OpenCV on 8-bit arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

Array = np.ndarray

FILL = (124, 116, 104)
"""Colour that becomes about 0 when the image is normalised."""

MIN_BOX = 1e-2
"""Boxes with a shorter side, in pixels, are dropped after a step."""


@dataclass
class Sample:
    """An image and its objects.

    Attributes:
        image: RGB (H, W, 3), uint8.
        boxes: x1, y1, x2, y2 in pixels of the image (n, 4), float32.
        labels: (n,), int64.
        masks: (n, H, W), uint8, 0 or 1; None where they are not wanted.
    """

    image: Array
    boxes: Array
    labels: Array
    masks: Array | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


def select(sample: Sample, index: Array) -> Sample:
    """Some of the objects, by a mask (n,) or by their places."""
    masks = None if sample.masks is None else sample.masks[index]
    return replace(sample, boxes=sample.boxes[index], labels=sample.labels[index], masks=masks)


def tidy(sample: Sample) -> Sample:
    """Clip the boxes to the image; drop objects whose box is left without an extent, or whose mask without a pixel."""
    height, width = sample.size
    boxes = np.clip(sample.boxes, 0, np.array([width, height, width, height], np.float32))
    keep = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > MIN_BOX
    if sample.masks is not None:
        keep &= np.any(sample.masks, (1, 2))
    sample = replace(sample, boxes=boxes)
    return sample if keep.all() else select(sample, keep)


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Resize bilinearly, the masks to the nearest pixel, the boxes by the true factor of each axis."""
    old_height, old_width = sample.size
    if (height, width) == (old_height, old_width):
        return sample
    image = cv2.resize(sample.image, (width, height), interpolation=cv2.INTER_LINEAR)
    factors = np.array([width / old_width, height / old_height] * 2, np.float32)
    masks = None if sample.masks is None else resize_masks(sample.masks, height, width)
    return Sample(image, sample.boxes * factors, sample.labels, masks)


def resize_masks(masks: Array, height: int, width: int) -> Array:
    """Masks (n, H, W) resized to the nearest pixel (n, height, width)."""
    resized = np.empty((len(masks), height, width), np.uint8)
    for source, target in zip(masks, resized, strict=True):
        cv2.resize(source, (width, height), dst=target, interpolation=cv2.INTER_NEAREST)
    return resized


def flip(sample: Sample) -> Sample:
    """Mirror left and right."""
    width = sample.size[1]
    boxes = sample.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
    boxes += np.array([width, 0, width, 0], np.float32)
    masks = None if sample.masks is None else sample.masks[:, :, ::-1]
    return Sample(sample.image[:, ::-1], boxes, sample.labels, masks)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut a window out of the image; objects without a part in it are dropped."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    boxes = sample.boxes - np.array([left, top, left, top], np.float32)
    masks = None if sample.masks is None else sample.masks[:, rows, columns]
    return tidy(Sample(sample.image[rows, columns], boxes, sample.labels, masks))


def pad(sample: Sample, height: int, width: int) -> Sample:
    """Enlarge at the bottom and the right, in the mean colour."""
    missing = height - sample.size[0], width - sample.size[1]
    if missing == (0, 0):
        return sample
    image = cv2.copyMakeBorder(sample.image, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=FILL)
    masks = sample.masks
    if masks is not None:
        masks = np.pad(masks, ((0, 0), (0, missing[0]), (0, missing[1])))
    return Sample(image, sample.boxes, sample.labels, masks)


def fit_boxes(masks: Array) -> Array:
    """Smallest boxes (n, 4), float32, around masks (n, H, W) that each have a pixel."""
    columns, rows = np.any(masks, 1), np.any(masks, 2)
    x1, y1 = columns.argmax(1), rows.argmax(1)
    x2, y2 = masks.shape[2] - columns[:, ::-1].argmax(1), masks.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack([x1, y1, x2, y2], 1).astype(np.float32)
