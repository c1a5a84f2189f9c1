"""What detectors and segmenters share: a backbone that gives maps, normalised and padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vizoo
from vizoo.dense import create_dense

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def build_backbone(backbone: Mapping[str, Any] | vizoo.Backbone) -> vizoo.Backbone:
    """A backbone that returns feature maps, with a norm per map where its family has them.

    Args:
        backbone: Arguments of `vizoo.create_model` without `features_only`, or a model built with it.

    Raises:
        TypeError: Neither of the two.
        ValueError: A classifier, or a config without a name.
    """
    if isinstance(backbone, vizoo.Backbone):
        if not backbone.features_only:
            raise ValueError("the backbone must return feature maps: build it with features_only=True")
        return backbone
    if not isinstance(backbone, Mapping):
        raise TypeError(
            f"backbone must be arguments of vizoo.create_model or a vizoo.Backbone, got {type(backbone).__name__}"
        )
    options = dict(backbone)
    if "name" not in options:
        raise ValueError(f"the backbone's config needs a name, got only {', '.join(options) or 'nothing'}")
    return create_dense(**options)


def normalize(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """An image of bytes (..., 3, H, W), RGB, as the float32 image that published models take."""
    return (image.float() - mean) / std


def pad_to(image: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    """An image or map (..., H, W), enlarged at the bottom and the right."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=value)


def padded_sides(images: Sequence[Tensor], multiple: int = 1) -> tuple[int, int]:
    """Smallest height and width, multiples of `multiple`, that hold every image."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class ImageBatcher(nn.Module):
    """Turns a list of images of bytes into one normalised batch, padded with zeros at the bottom and the right.

    Args:
        mean: Mean of each channel, on 0..255.
        std: Standard deviation of each channel, on 0..255.
        multiple: Height and width of a batch are multiples of this.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, multiple: int = 1) -> None:
        super().__init__()
        self.multiple = multiple
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor], least: tuple[int, int] = (0, 0)) -> Tensor:
        """Images (3, H, W) of any sizes to (B, 3, height, width), at least as large as `least`."""
        height, width = padded_sides(images, self.multiple)
        sides = max(height, least[0]), max(width, least[1])
        return torch.stack([pad_to(normalize(image, self.mean, self.std), *sides) for image in images])
