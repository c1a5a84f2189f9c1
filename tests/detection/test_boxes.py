"""Deltas, assignment and suppression."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder
from torchvision.ops import box_iou

from vizoo.train.detection.boxes import IGNORED, NEGATIVE, Assigner, BoxCoder, not_empty, rescale, suppress


def random_boxes(count: int, side: float = 100.0) -> Tensor:
    corner = torch.rand(count, 2) * side * 0.7
    return torch.cat([corner, corner + 2 + torch.rand(count, 2) * side * 0.3], dim=1)


def test_decoding_inverts_encoding() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, truth = random_boxes(20), random_boxes(20)
    deltas = coder.encode_single(truth, boxes)
    torch.testing.assert_close(coder.decode_single(deltas, boxes), truth, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_deltas_are_clipped_on_both_sides(weights: tuple[float, float, float, float]) -> None:
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    deltas = torch.tensor([[0.0, 0.0, -100.0, -100.0, 0.0, 0.0, 100.0, 1.0]])
    shrunk, grown = BoxCoder(weights).decode_single(deltas, box).view(2, 4)
    limit = 1000 / 16
    torch.testing.assert_close(shrunk[2:] - shrunk[:2], torch.full((2,), 1000 / limit))
    torch.testing.assert_close(grown[2] - grown[0], torch.tensor(1000 * limit))
    torch.testing.assert_close(grown[3] - grown[1], torch.tensor(1000 * math.exp(1 / weights[3])))


def test_without_the_lower_clip_it_is_torchvisions() -> None:
    boxes, deltas = random_boxes(10), 10 * torch.randn(10, 12)
    expected = TorchvisionCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, boxes)
    assert torch.equal(BoxCoder(clip_both_sides=False).decode_single(deltas, boxes), expected)
    assert not torch.equal(BoxCoder().decode_single(deltas, boxes), expected)


def assign_one_by_one(objects: Tensor, boxes: Tensor, positive: float, negative: float, least: float | None) -> Tensor:
    """The rule, object by object."""
    iou = box_iou(objects, boxes)
    owner = torch.full((len(boxes),), IGNORED)
    for j in range(len(boxes)):
        best = int(iou[:, j].argmax())
        if iou[best, j] < negative:
            owner[j] = NEGATIVE
        elif iou[best, j] >= positive:
            owner[j] = best
    for i in range(len(objects)) if least is not None else ():
        if iou[i].max() >= least:
            owner[iou[i] == iou[i].max()] = i
    return owner


@pytest.mark.parametrize("least", [None, 0.0, 0.3, 0.5])
def test_assignment_follows_the_rule(least: float | None) -> None:
    for _ in range(20):
        objects, boxes = random_boxes(6), random_boxes(80)
        boxes[40:50] = boxes[:10]  # ties
        expected = assign_one_by_one(objects, boxes, 0.5, 0.3, least)
        assert torch.equal(Assigner(0.5, 0.3, least).assign(objects, boxes), expected)


def test_a_claimed_box_changes_its_owner() -> None:
    """Both objects have their best overlap with one box, which overlaps the first one more: the second gets it."""
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 20.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 11.0], [50.0, 50.0, 60.0, 60.0]])
    assert Assigner(0.7, 0.3, 0.3).assign(objects, boxes).tolist() == [1, NEGATIVE]
    assert Assigner(0.7, 0.3, 0.6).assign(objects, boxes).tolist() == [0, NEGATIVE]  # 0.55 is too little to claim


def test_an_object_that_overlaps_nothing_claims_nothing() -> None:
    far = torch.tensor([[500.0, 500.0, 510.0, 510.0]])
    assert Assigner(0.5, 0.4, 0.0).assign(far, random_boxes(5)).tolist() == [NEGATIVE] * 5


def test_no_objects_and_no_boxes() -> None:
    assigner = Assigner(0.5, 0.4, 0.0)
    assert assigner.assign(torch.zeros(0, 4), random_boxes(3)).tolist() == [NEGATIVE] * 3
    assert assigner.assign(random_boxes(3), torch.zeros(0, 4)).shape == (0,)


def test_thresholds_are_ordered() -> None:
    with pytest.raises(ValueError, match=r"negative IoU must not exceed the positive one, got 0\.7 and 0\.3"):
        Assigner(0.3, 0.7)


def test_suppression_is_by_class_and_limited() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9], [0.0, 0, 10, 9], [30.0, 0, 40, 10]])
    scores, labels = torch.tensor([0.8, 0.9, 0.7, 0.3]), torch.tensor([0, 0, 1, 0])
    found = suppress(boxes, scores, labels, nms=0.5, limit=10)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.3]))
    assert found.labels.tolist() == [0, 1, 0]
    assert len(suppress(boxes, scores, labels, nms=0.5, limit=2).boxes) == 2


def test_rescaling_takes_each_axis_by_its_own_factor() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    expected = torch.tensor([[20.0, 10.0, 60.0, 20.0]])
    torch.testing.assert_close(rescale(boxes, (100, 100), (50, 200)), expected)


def test_boxes_without_extent_are_empty() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 1, 5], [0.0, 5, 9, 5], [4.0, 4, 2, 6]])
    assert not_empty(boxes).tolist() == [True, False, False, False]
