"""Anchors: not rounded, at constant strides."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from vizoo.train.detection.anchors import Anchors


def test_sizes_are_not_rounded() -> None:
    anchors = Anchors.by_scale((4,), 8.0)([torch.zeros(1, 1, 1, 1)])[0]
    root = 2**0.5
    expected = [[-16 * root, -8 * root], [-16, -16], [-8 * root, -16 * root]]
    torch.testing.assert_close(anchors[:, :2], torch.tensor(expected))
    torch.testing.assert_close(anchors[:, 2:], -anchors[:, :2])


def test_octaves() -> None:
    anchors = Anchors.by_scale((8,), 4.0, 3)([torch.zeros(1, 1, 1, 1)])[0]
    areas = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1)
    sizes = torch.tensor([32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)])
    torch.testing.assert_close(areas.sqrt(), sizes.repeat(3))  # ratio by ratio, within it size by size


def test_strides_are_constant_where_torchvision_divides() -> None:
    """A side of 800 pixels has 13 rows at stride 64, which makes torchvision's stride 61."""
    maps = [torch.zeros(1, 1, 13, 17)]
    anchors = Anchors.by_scale((64,), 8.0)(maps)[0].view(13, 17, 3, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    torch.testing.assert_close(centres[12, 16, 0], torch.tensor([16 * 64.0, 12 * 64.0]))
    torch.testing.assert_close(centres[0, 0], torch.zeros(3, 2))


def test_rounded_anchors_are_torchvisions() -> None:
    sizes = ((32,), (64,))
    maps = [torch.zeros(1, 1, 16, 24), torch.zeros(1, 1, 8, 12)]
    ours = Anchors((4, 8), sizes, rounded=True)(maps)
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 2)(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), maps)[0]
    torch.testing.assert_close(torch.cat(ours), theirs)


def test_anchors_are_float32_for_any_map() -> None:
    assert Anchors.by_scale((4,), 8.0)([torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)])[0].dtype == torch.float32


def test_one_group_of_sizes_per_stride() -> None:
    with pytest.raises(ValueError, match="one group of sizes per stride, got 1 for 2 strides"):
        Anchors((4, 8), ((32,),))
