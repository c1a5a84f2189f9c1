"""Training and test transforms in which boxes, masks and labels follow the image.

The official pipelines are steps of OpenCV on 8-bit images, as the published models were trained and tested with;
albumentations' transforms can be added to each. Every draw comes from torch's generator (see
`vizoo.train.transforms.prepare_worker`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vizoo.train.geometry import fit, integer, uniform
from vizoo.train.transforms import Seeded, prepare_worker, seeded_pipeline

from .samples import Array, Sample, crop, fit_boxes, flip, pad, resize, select, tidy

MAX_LONG, SHORT = 1333, 800
SHORT_SIDES = tuple(range(480, 801, 32))


class DetectionTransform:
    """Base of the transforms: flips, does the steps of `geometry`, then `extra`, and drops what has no extent left.

    Args:
        hflip: Probability of mirroring left and right, before everything else.
        extra: albumentations transforms or their configs, applied last; boxes and masks follow.

    Raises:
        ValueError: A probability outside [0, 1], or an unknown albumentations transform or argument.
    """

    def __init__(self, *, hflip: float = 0.0, extra: Sequence[Any] = ()) -> None:
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip must lie in [0, 1], got {hflip}")
        self.hflip = hflip
        self.extra = _pipeline_with_boxes(extra) if extra else None

    def __call__(self, sample: Sample) -> Sample:
        """Transform one image with its objects."""
        prepare_worker()
        if self.hflip and uniform(0, 1) < self.hflip:
            sample = flip(sample)
        sample = self.geometry(sample)
        return tidy(sample if self.extra is None else self._extra(sample))

    def geometry(self, sample: Sample) -> Sample:
        """The steps that give the sample its size; none here."""
        return sample

    def _extra(self, sample: Sample) -> Sample:
        assert self.extra is not None
        sample = tidy(sample)  # albumentations wants boxes inside the image
        data: dict[str, Any] = {"image": np.ascontiguousarray(sample.image), "bboxes": sample.boxes}
        if sample.masks is not None and len(sample.masks):
            data["masks"] = np.ascontiguousarray(sample.masks)
        found = self.extra(**data, places=np.arange(len(sample.boxes)))
        places = np.asarray(found["places"], np.int64)
        boxes = np.asarray(found["bboxes"], np.float32).reshape(-1, 4)
        masks = sample.masks
        if masks is not None:
            # albumentations drops boxes, but never their masks.
            empty = np.zeros((0, *found["image"].shape[:2]), np.uint8)
            masks = np.asarray(found["masks"], np.uint8)[places] if "masks" in found else empty
        return Sample(found["image"], boxes, sample.labels[places], masks)


class ResizeTransform(DetectionTransform):
    """Resize to a long side up to `long` and a short side up to `short`; for tests, and for the plain 1x recipe.

    Args:
        short: Largest short side in pixels; of several, one is drawn for each image.
        long: Largest long side in pixels.
        hflip: Probability of mirroring left and right: 0.5 for training.
        extra: albumentations transforms or their configs, applied last.

    Raises:
        ValueError: A side below 1, or what `DetectionTransform` refuses.
    """

    def __init__(
        self, *, short: int | Sequence[int] = SHORT, long: int = MAX_LONG, hflip: float = 0.0, extra: Sequence[Any] = ()
    ) -> None:
        super().__init__(hflip=hflip, extra=extra)
        self.short = _sides("short", short)
        self.long = _sides("long", long)[0]

    def geometry(self, sample: Sample) -> Sample:
        """Resize."""
        return self._resize(sample, self.short)

    def _resize(self, sample: Sample, choices: Sequence[int]) -> Sample:
        short = choices[integer(0, len(choices) - 1)] if len(choices) > 1 else choices[0]
        return resize(sample, *fit(*sample.size, self.long, short))


class ResizeCropTransform(ResizeTransform):
    """What Swin's detectors were trained with: flip, then resize, or else resize, crop and resize, with equal chance.

    Args:
        short: Short sides of the result, one drawn for each image.
        long: Largest long side in pixels.
        crop_short: Short sides before the crop.
        crop: Least and greatest height and width of the crop, each drawn alone; the image's own side where it is less.
        crop_prob: Chance of the way with the crop.
        hflip: Probability of mirroring left and right.
        extra: albumentations transforms or their configs, applied last.

    Raises:
        ValueError: A side below 1, an empty range, a chance outside [0, 1], or what `DetectionTransform` refuses.
    """

    def __init__(
        self,
        *,
        short: int | Sequence[int] = SHORT_SIDES,
        long: int = MAX_LONG,
        crop_short: int | Sequence[int] = (400, 500, 600),
        crop: Sequence[int] = (384, 600),
        crop_prob: float = 0.5,
        hflip: float = 0.5,
        extra: Sequence[Any] = (),
    ) -> None:
        super().__init__(short=short, long=long, hflip=hflip, extra=extra)
        self.crop_short, self.crop = _sides("crop_short", crop_short), _sides("crop", crop)
        if len(self.crop) != 2 or self.crop[0] > self.crop[1]:
            raise ValueError(f"crop must be (least, greatest) side in pixels, got {self.crop}")
        if not 0 <= crop_prob <= 1:
            raise ValueError(f"crop_prob must lie in [0, 1], got {crop_prob}")
        self.crop_prob = crop_prob

    def geometry(self, sample: Sample) -> Sample:
        """Resize, or resize, crop and resize."""
        if uniform(0, 1) < self.crop_prob:
            sample = self._crop(self._resize(sample, self.crop_short))
        return self._resize(sample, self.short)

    def _crop(self, sample: Sample) -> Sample:
        sides = [integer(min(side, self.crop[0]), min(side, self.crop[1])) for side in sample.size]
        top, left = (integer(0, side - kept) for side, kept in zip(sample.size, sides, strict=True))
        return crop(sample, top, left, *sides)


class JitterTransform(DetectionTransform):
    """Large-scale jitter: resize by a random ratio, then crop or pad to a square.

    Boxes are fitted to what the crop leaves of the masks, where there are masks.

    Args:
        size: Side of the square.
        ratio: Range of the resized image's long side, as a share of `size`.
        hflip: Probability of mirroring left and right.
        extra: albumentations transforms or their configs, applied last.

    Raises:
        ValueError: A side below 1, an empty range, or what `DetectionTransform` refuses.
    """

    def __init__(
        self,
        *,
        size: int = 1024,
        ratio: Sequence[float] = (0.1, 2.0),
        hflip: float = 0.5,
        extra: Sequence[Any] = (),
    ) -> None:
        super().__init__(hflip=hflip, extra=extra)
        self.side = _sides("size", size)[0]
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range (low, high) with 0 < low <= high, got {tuple(ratio)}")
        self.ratio = tuple(ratio)

    def geometry(self, sample: Sample) -> Sample:
        """Resize, crop, pad."""
        long = max(1.0, self.side * uniform(*self.ratio))
        sample = resize(sample, *fit(*sample.size, long, long))
        sides = [min(side, self.side) for side in sample.size]
        if sides != list(sample.size):
            top, left = (integer(0, side - kept) for side, kept in zip(sample.size, sides, strict=True))
            sample = crop(sample, top, left, *sides)
            if sample.masks is not None:
                sample = replace(sample, boxes=fit_boxes(sample.masks))
        return pad(sample, self.side, self.side)


class CopyPaste:
    """Pastes objects of another image, at their places, over an image; what they hide leaves the masks below.

    Both images should come out of a `JitterTransform`. Objects that are hidden but for a small part are dropped.

    Args:
        prob: Probability that an image gets objects at all.
        max_objects: Paste up to so many, at least one, drawn at random; None for up to all.
        min_visible: Drop an object when less than this share of its pixels stays visible.

    Raises:
        ValueError: A share outside [0, 1], or fewer than 1 object.
    """

    def __init__(self, prob: float = 0.5, max_objects: int | None = None, min_visible: float = 0.1) -> None:
        for name, value in {"prob": prob, "min_visible": min_visible}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if max_objects is not None and max_objects < 1:
            raise ValueError(f"max_objects must be 1 or more, or None, got {max_objects}")
        self.prob, self.max_objects, self.min_visible = prob, max_objects, min_visible

    def __call__(self, sample: Sample, other: Sample) -> Sample:
        """Paste objects of `other` over `sample`.

        Raises:
            ValueError: One of them has no masks.
        """
        if sample.masks is None or other.masks is None:
            raise ValueError("copy-paste needs masks: build the data set with masks=True")
        if not len(other.labels):
            return sample
        count = len(other.labels) if self.max_objects is None else min(self.max_objects, len(other.labels))
        chosen = torch.randperm(len(other.labels))[: integer(1, count)].numpy()
        height, width = (min(a, b) for a, b in zip(sample.size, other.size, strict=True))
        pasted = pad(crop(select(other, chosen), 0, 0, height, width), *sample.size)
        assert pasted.masks is not None
        cover = np.any(pasted.masks, 0)
        below = self._hide(sample, cover)
        assert below.masks is not None
        return Sample(
            np.where(cover[:, :, None], pasted.image, sample.image),
            np.concatenate([below.boxes, pasted.boxes]),
            np.concatenate([below.labels, pasted.labels]),
            np.concatenate([below.masks, pasted.masks]),
        )

    def _hide(self, sample: Sample, cover: Array) -> Sample:
        """What stays of the objects where `cover` (H, W) lies over them."""
        assert sample.masks is not None
        masks = sample.masks * ~cover
        before, after = (np.count_nonzero(m, axis=(1, 2)) for m in (sample.masks, masks))
        keep = (after > 0) & (after >= self.min_visible * before)
        found = select(replace(sample, masks=masks), keep)
        cut = (after < before)[keep]
        if cut.any():
            assert found.masks is not None
            found.boxes[cut] = fit_boxes(found.masks[cut])
        return found


def _pipeline_with_boxes(transforms: Sequence[Any]) -> Seeded:
    boxes = {"format": "pascal_voc", "label_fields": ["places"], "clip": True, "filter_invalid_bboxes": True}
    with warnings.catch_warnings():
        # Transforms of colours alone leave boxes as they are, which albumentations finds worth a warning.
        warnings.filterwarnings("ignore", "Got processor for bboxes", UserWarning)
        return seeded_pipeline(transforms, bbox_params=boxes)


def _sides(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    sides = (value,) if isinstance(value, int) else tuple(value)
    if not sides or min(sides) < 1:
        raise ValueError(f"{name} must be 1 pixel or more, got {value}")
    return sides
