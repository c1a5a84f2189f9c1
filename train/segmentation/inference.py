"""How an image is read at test time: whole, in sliding windows, or at several scales and mirrored.

A mode is a small frozen object that the `Segmenter` is given; in a config it is `dict(type=Sliding, crop=..., ...)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.registry import TASK_UTILS
from torch import Tensor

from .layers import resize

Forward = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) to logits of any stride (B, classes, h, w)."""


class Inference(ABC):
    """A way to read images: subclasses give logits at the size of the image that the network saw."""

    @abstractmethod
    def at_input_size(self, forward: Forward, x: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of normalised images (B, 3, H, W)."""

    def __call__(self, forward: Forward, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores (B, classes, *size), the largest of which is the prediction.

        They are resized twice, as published: to the size of the image that the network saw, then to the original's.
        One direct resize gives other classes along borders.
        """
        return resize(self.at_input_size(forward, x), size)


@TASK_UTILS.register_module()
@dataclass(frozen=True)
class Whole(Inference):
    """The whole image at once."""

    def at_input_size(self, forward: Forward, x: Tensor) -> Tensor:
        """See `Inference`."""
        return resize(forward(x).float(), x.shape[2:])


@TASK_UTILS.register_module()
@dataclass(frozen=True)
class Sliding(Inference):
    """Windows that overlap, their logits averaged; the last one of a row or column is moved back inside the image.

    Attributes:
        crop: Height and width of a window, at least 32; smaller images are read whole.
        stride: Distance between windows down and across, at most the window's sides.

    Raises:
        ValueError: Windows below 32 pixels, or strides that leave pixels unread.
    """

    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)

    def __post_init__(self) -> None:
        if min(self.crop) < 32:
            raise ValueError(f"windows must have sides of at least 32, got crop={tuple(self.crop)}")
        if any(not 1 <= step <= side for step, side in zip(self.stride, self.crop, strict=True)):
            raise ValueError(f"strides must lie in 1..crop {tuple(self.crop)}, got stride={tuple(self.stride)}")

    def at_input_size(self, forward: Forward, x: Tensor) -> Tensor:
        """See `Inference`."""
        rows, columns = (window_starts(*args) for args in zip(x.shape[2:], self.crop, self.stride, strict=True))
        total = count = torch.zeros(())
        for number, (top, left) in enumerate((top, left) for top in rows for left in columns):
            area = (..., slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
            part = x[area]
            logits = resize(forward(part).float(), part.shape[2:])
            if number == 0:
                total = logits.new_zeros(*logits.shape[:2], *x.shape[2:])
                count = logits.new_zeros(x.shape[2:])
            total[area] += logits
            count[area] += 1
        return total / count


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` pixels start on an axis of `length` pixels; the last one ends at the border."""
    number = -(-max(length - crop, 0) // stride) + 1
    return [max(min(i * stride, length - crop), 0) for i in range(number)]


@TASK_UTILS.register_module()
@dataclass(frozen=True)
class MultiScale:
    """The mean of the probabilities at several scales, each also mirrored.

    Published figures scale the image of the file: give the data set's images unscaled and set `scale` to what single
    scale evaluation uses. The published code rounds resized images to bytes, this one does not.

    Attributes:
        ratios: Factors on the scale.
        flip: Read each scaled image mirrored, too.
        inner: How each image is read.
        scale: Longest and shortest side that an image may have at ratio 1, (2048, 512) for ADE20K; None takes the
            image as it comes.

    Raises:
        ValueError: No ratio, or one that is not positive.
    """

    ratios: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    flip: bool = True
    inner: Inference = field(default_factory=Whole)
    scale: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios must be positive and at least one, got {tuple(self.ratios)}")

    def __call__(self, forward: Forward, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mean probabilities (B, classes, *size) of normalised images (B, 3, H, W)."""
        total, number = torch.zeros((), device=x.device), 0
        for ratio in self.ratios:
            scaled = resize(x, scaled_sides(x.shape[2:], ratio, self.scale))
            for mirrored in (False, True)[: 1 + self.flip]:
                image = scaled.flip(3) if mirrored else scaled
                found = self.inner(forward, image, size).softmax(1)
                total, number = total + (found.flip(3) if mirrored else found), number + 1
        return total / number


def scaled_sides(sides: Sequence[int], ratio: float, scale: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of an image at a ratio: as large as fits into `ratio` times the scale, sides rounded.

    Args:
        sides: Height and width of the image.
        ratio: Factor on the scale.
        scale: Longest and shortest side at ratio 1; None takes the image's own.
    """
    if scale is not None:
        longest, shortest = (int(limit * ratio) for limit in (max(scale), min(scale)))
        ratio = min(longest / max(sides), shortest / min(sides))
    return int(sides[0] * ratio + 0.5), int(sides[1] * ratio + 0.5)


def build_inference(mode: Any) -> Any:
    """A mode from its config, the `inner` mode of one included; anything else is returned as it is."""
    if not isinstance(mode, Mapping):
        return mode
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in mode.items()}
    if "inner" in options:
        options["inner"] = build_inference(options["inner"])
    return TASK_UTILS.build(options)
