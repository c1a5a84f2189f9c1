"""The evaluation transform: what an image goes through before a published accuracy is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vizoo.backbones.base import nearest
from vizoo.weights.record import IMAGENET_MEAN, IMAGENET_STD

from .images import to_rgb

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash")
CHANNELS = {1: "L", 3: "RGB"}

MAX_RESIZED = 1 << 25
"""Pixels a resized image may have before it is cropped first: only shapes beyond about 500 to 1 reach it."""


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize with antialiasing, crop the centre, normalise: a PIL image becomes a float32 tensor (C, H, W).

    Equal to timm's and torchvision's evaluation transforms bit for bit, without needing either.

    Attributes:
        size: Height and width of the result; one number for both.
        crop_pct: Fraction of the resized image that the crop keeps: the image is resized to floor(size / crop_pct).
        crop_mode: `center` resizes the short side and keeps the aspect ratio; `squash` resizes both sides.
        interpolation: Pillow's filter: nearest, bilinear, bicubic, box, hamming or lanczos.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        channels: 3 for RGB, 1 for gray.

    Raises:
        ValueError: A value out of range, or as many means or deviations as there are not channels.
    """

    size: int | Sequence[int] = 224
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    channels: int = 3

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise ValueError(f"size must be one positive number, or height and width, got {self.size!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"unknown crop_mode {self.crop_mode!r}; {nearest(self.crop_mode, CROP_MODES)}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; {nearest(self.interpolation, FILTERS)}")
        if self.channels not in CHANNELS:
            raise ValueError(f"images have 1 or 3 channels, got channels={self.channels}")
        check_moments(self.mean, self.std, self.channels)

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[-1])
        return height, width

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one image; other modes than RGB are converted as `vizoo.images.to_rgb` does.

        Returns:
            The normalised image (C, H, W), float32.
        """
        return to_tensor(self._crop(self._resize(self._convert(image))), self.mean, self.std)

    def _convert(self, image: Image.Image) -> Image.Image:
        mode = CHANNELS[self.channels]
        return image if image.mode == mode else to_rgb(image).convert(mode)

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = (math.floor(side / self.crop_pct) for side in self.target)
        if self.crop_mode == "center":
            image = _shorten(image, height, width)
            height, width = _keep_ratio(image.height, image.width, height, width)
        return image.resize((width, height), FILTERS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.target
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


def _keep_ratio(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size at which an image just covers the target."""
    if target_height == target_width:
        if height <= width:
            return target_height, int(target_height * width / height)
        return int(target_height * height / width), target_height
    ratio = min(height / target_height, width / target_width)
    return round(height / ratio), round(width / ratio)


def _shorten(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the ends, which the crop drops anyway, off an image so long that resizing it would fill the memory.

    The picture may move by part of a pixel, since the shorter image rounds to another size.
    """
    resized_height, resized_width = _keep_ratio(image.height, image.width, height, width)
    if resized_height * resized_width <= MAX_RESIZED:
        return image
    # Four times what the crop needs, so that no filter reaches the cut; an even cut keeps the centre.
    ratio = min(image.height / height, image.width / width)
    keep = [
        min(side, math.ceil(4 * target * ratio) + 8) for side, target in ((image.width, width), (image.height, height))
    ]
    left, top = (image.width - keep[0]) // 2, (image.height - keep[1]) // 2
    return image.crop((left, top, image.width - left, image.height - top))


def to_tensor(image: Image.Image | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale an 8-bit image (H, W) or (H, W, C) to [0, 1], subtract the mean, divide by the deviation: (C, H, W)."""
    pixels = np.array(image, dtype=np.uint8)
    tensor = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])
    tensor = tensor.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    shape = (-1, 1, 1)
    return tensor.sub_(torch.tensor(tuple(mean)).view(shape)).div_(torch.tensor(tuple(std)).view(shape))


def check_moments(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise ValueError unless there is one mean and one positive deviation per channel."""
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{channels} channels need {channels} means and deviations, got mean={mean}, std={std}")
    if min(std) <= 0:
        raise ValueError(f"standard deviations must be positive, got std={std}")


def eval_transform(cfg: Mapping[str, Any]) -> EvalTransform:
    """The transform that the weights behind a `default_cfg` were evaluated with.

    Args:
        cfg: A model's `default_cfg`, ours or timm's: `input_size` (C, H, W), `crop_pct`, `crop_mode`, `interpolation`,
            `mean`, `std`; other keys are not about images and are not looked at. `input_size` is required, the
            others default as in `EvalTransform`. A one-channel model made from three-channel weights gets the mean
            of their means and deviations.

    Raises:
        ValueError: `input_size` is absent or not (C, H, W), or a value is out of range.
    """
    size = cfg.get("input_size")
    if not isinstance(size, Sequence) or len(size) != 3:
        raise ValueError(f"input_size must be (channels, height, width), got {size!r}")
    channels, height, width = size
    mean, std = tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))
    if channels == 1 and len(mean) == len(std) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return EvalTransform(
        size=(height, width),
        crop_pct=cfg.get("crop_pct", EvalTransform.crop_pct),
        crop_mode=cfg.get("crop_mode", EvalTransform.crop_mode),
        interpolation=cfg.get("interpolation", EvalTransform.interpolation),
        mean=mean,
        std=std,
        channels=channels,
    )
