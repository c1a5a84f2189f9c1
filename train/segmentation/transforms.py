"""Training and test transforms of images with a label for every pixel.

Steps of OpenCV on 8-bit images, as the published models were trained and tested with. Every draw comes from torch's
generator (see `vizoo.train.transforms.prepare_worker`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from vizoo.train.geometry import fit, integer, uniform
from vizoo.train.transforms import prepare_worker, seeded_pipeline

from .classes import IGNORE

Array = np.ndarray

SCALE = (2048, 512)


@dataclass
class Sample:
    """An image and its labels.

    Attributes:
        image: RGB (H, W, 3), uint8.
        labels: Label of each pixel (H, W), 255 where there is none, uint8.
    """

    image: Array
    labels: Array

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Resize the image bilinearly, the labels to the nearest pixel."""
    if sample.size == (height, width):
        return sample
    return Sample(_resize_image(sample.image, height, width), _resize_labels(sample.labels, height, width))


def _resize_image(image: Array, height: int, width: int) -> Array:
    resized: Array = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized


def _resize_labels(labels: Array, height: int, width: int) -> Array:
    resized: Array = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    return resized


class PhotometricDistortion:
    """Changes brightness, contrast, saturation and hue of an 8-bit image, each with a chance of one half.

    Contrast changes before or after saturation and hue. Every step ends in 8 bits again, cut off, not rounded.

    Args:
        brightness: Largest change, of 255.
        contrast: Range of the factor.
        saturation: Range of the factor.
        hue: Largest change, of 180.

    Raises:
        ValueError: A negative change or factor, an empty range, or a hue above 180.
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: int = 18,
    ) -> None:
        for name, (low, high) in {"contrast": contrast, "saturation": saturation}.items():
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be a range (low, high) with 0 <= low <= high, got {(low, high)}")
        if brightness < 0 or not 0 <= hue <= 180:
            raise ValueError(f"brightness must be 0 or more and hue 0 to 180, got {brightness} and {hue}")
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def __call__(self, image: Array) -> Array:
        """Distort an RGB image (H, W, 3), uint8."""
        if _coin():
            image = _scaled(image, 1, uniform(-self.brightness, self.brightness))
        late = _coin()
        if not late and _coin():
            image = _scaled(image, uniform(*self.contrast), 0)
        image = self._colour(image)
        if late and _coin():
            image = _scaled(image, uniform(*self.contrast), 0)
        return image

    def _colour(self, image: Array) -> Array:
        if _coin():
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[:, :, 1] = _scaled(hsv[:, :, 1], uniform(*self.saturation), 0)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if self.hue and _coin():
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            change = integer(-self.hue, self.hue - 1)
            hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + change) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        return image


class ScaleCropTransform:
    """What UPerNet and Semantic FPN were trained with: resize by a random ratio, crop, flip, distort.

    The crop is drawn again, up to `retries` times, while one class fills too much of its labelled pixels. An image
    smaller than the crop stays smaller: models pad the batch.

    Args:
        scale: Largest long and short side in pixels, at ratio 1.
        ratio: Range of the ratio; both sides times it are truncated to whole pixels.
        crop: Height and width of the crop; one number for both.
        max_share: Largest share of one class; 1 accepts every crop.
        retries: Crops to draw at most after the first.
        hflip: Probability of mirroring left and right.
        distort: Distort colours: True by the published ranges, `PhotometricDistortion` or its arguments for others.
        extra: albumentations transforms or their configs, applied last; labels follow.

    Raises:
        ValueError: A side below 1, an empty range, a share or probability outside [0, 1], negative retries, or an
            unknown albumentations transform or argument.
    """

    def __init__(
        self,
        *,
        scale: Sequence[int] = SCALE,
        ratio: Sequence[float] = (0.5, 2.0),
        crop: int | Sequence[int] = 512,
        max_share: float = 0.75,
        retries: int = 10,
        hflip: float = 0.5,
        distort: bool | PhotometricDistortion | dict[str, Any] = True,
        extra: Sequence[Any] = (),
    ) -> None:
        self.scale = _two_sides("scale", scale)
        self.crop = _two_sides("crop", (crop, crop) if isinstance(crop, int) else crop)
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range (low, high) with 0 < low <= high, got {tuple(ratio)}")
        for name, value in {"max_share": max_share, "hflip": hflip}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, got {retries}")
        self.ratio, self.max_share, self.retries, self.hflip = tuple(ratio), max_share, retries, hflip
        if isinstance(distort, bool):
            self.distort = PhotometricDistortion() if distort else None
        else:
            self.distort = distort if isinstance(distort, PhotometricDistortion) else PhotometricDistortion(**distort)
        self.extra = seeded_pipeline(extra) if extra else None

    def __call__(self, sample: Sample) -> Sample:
        """Transform one image with its labels."""
        prepare_worker()
        ratio = uniform(*self.ratio)
        sides = [max(1, int(side * ratio)) for side in self.scale]
        sample = resize(sample, *fit(*sample.size, max(sides), min(sides)))
        sample = self._crop(sample)
        if uniform(0, 1) < self.hflip:
            sample = Sample(sample.image[:, ::-1], sample.labels[:, ::-1])
        if self.distort is not None:
            sample = Sample(self.distort(np.ascontiguousarray(sample.image)), sample.labels)
        if self.extra is not None:
            image, labels = np.ascontiguousarray(sample.image), np.ascontiguousarray(sample.labels)
            found = self.extra(image=image, mask=labels)
            sample = Sample(found["image"], found["mask"])
        return sample

    def _crop(self, sample: Sample) -> Sample:
        window = self._window(sample.labels)
        for _ in range(self.retries if self.max_share < 1 else 0):
            if self._is_varied(sample.labels[window]):
                break
            window = self._window(sample.labels)
        return Sample(sample.image[window], sample.labels[window])

    def _window(self, labels: Array) -> tuple[slice, slice]:
        starts = [integer(0, max(side - kept, 0)) for side, kept in zip(labels.shape, self.crop, strict=True)]
        return slice(starts[0], starts[0] + self.crop[0]), slice(starts[1], starts[1] + self.crop[1])

    def _is_varied(self, labels: Array) -> bool:
        """Whether there are two classes or more, and none fills the labelled pixels."""
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
        counts[IGNORE] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.max_share * counts.sum())


class ResizeTransform:
    """Resizes the image to fit `scale`; the labels stay as they are, since models are judged at the original size.

    Args:
        scale: Largest long and short side in pixels.

    Raises:
        ValueError: A side below 1.
    """

    def __init__(self, *, scale: Sequence[int] = SCALE) -> None:
        self.scale = _two_sides("scale", scale)

    def __call__(self, sample: Sample) -> Sample:
        """Resize the image, not the labels."""
        height, width = fit(*sample.size, max(self.scale), min(self.scale))
        return Sample(_resize_image(sample.image, height, width), sample.labels)


def _two_sides(name: str, sides: Sequence[int]) -> tuple[int, int]:
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name} must be two sides of 1 pixel or more, got {tuple(sides)}")
    return sides[0], sides[1]


def _scaled(values: Array, factor: float, change: float) -> Array:
    changed = values.astype(np.float32) * factor + change
    limited: Array = np.clip(changed, 0, 255).astype(np.uint8)
    return limited


def _coin() -> bool:
    return integer(0, 1) == 1
