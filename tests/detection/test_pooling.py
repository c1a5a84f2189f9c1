"""Pooled features of boxes: which level, which sampling."""

from __future__ import annotations

import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from vizoo.train.detection.pooling import RoIPooler

STRIDES = (4, 8, 16, 32)


def maps(batch: int = 2, side: int = 256) -> list[torch.Tensor]:
    return [torch.randn(batch, 5, side // s, side // s) for s in STRIDES]


def test_levels_change_at_octaves_of_112() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 448.0, 4000.0, 0.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert RoIPooler(7, STRIDES).levels(boxes).tolist() == [0, 0, 1, 1, 2, 3, 3, 0]


def test_features_come_from_the_level_of_the_box_in_its_own_image() -> None:
    features = maps()
    boxes = [
        torch.tensor([[3.0, 5.0, 40.0, 30.0], [10.0, 10.0, 250.0, 250.0]]),
        torch.tensor([[0.0, 0.0, 130.0, 120.0]]),
    ]
    pooled = RoIPooler(7, STRIDES)(features, boxes)
    for row, (level, image, box) in enumerate(((0, 0, boxes[0][0]), (2, 0, boxes[0][1]), (1, 1, boxes[1][0]))):
        expected = roi_align(features[level][image, None], [box[None]], 7, 1 / STRIDES[level], 0, True)
        torch.testing.assert_close(pooled[row, None], expected)


def test_with_its_settings_it_is_torchvisions() -> None:
    features = maps()
    corner = torch.rand(2, 9, 2) * 100
    boxes = list(torch.cat([corner, corner + 5 + torch.rand(2, 9, 2) * 150], dim=2))
    stock = MultiScaleRoIAlign([str(i) for i in range(4)], 7, 2)
    expected = stock({str(i): m for i, m in enumerate(features)}, boxes, [(256, 256)] * 2)
    ours = RoIPooler(7, STRIDES, sampling_ratio=2, aligned=False)(features, boxes)
    torch.testing.assert_close(ours, expected)


def test_boxes_without_width_give_zeros() -> None:
    assert not RoIPooler(7, STRIDES)(maps(1), [torch.tensor([[5.0, 5.0, 5.0, 40.0]])]).any()


def test_no_boxes_and_extra_levels() -> None:
    features = [*maps(), torch.randn(2, 5, 4, 4)]
    assert RoIPooler(7, STRIDES)(features, [torch.zeros(0, 4)] * 2).shape == (0, 5, 7, 7)


def test_half_precision_maps_are_pooled_in_float32() -> None:
    features = [m.bfloat16().requires_grad_() for m in maps(1)]
    with torch.autocast("cpu", torch.bfloat16):
        pooled = RoIPooler(7, STRIDES)(features, [torch.tensor([[3.0, 5.0, 40.0, 30.0]])])
    assert pooled.dtype == torch.float32
    exact = RoIPooler(7, STRIDES)([m.float() for m in features], [torch.tensor([[3.0, 5.0, 40.0, 30.0]])])
    assert torch.equal(pooled, exact)
    pooled.sum().backward()
    assert features[0].grad is not None
    assert features[0].grad.any()
