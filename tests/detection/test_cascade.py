"""What passes from stage to stage of a cascade."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from vizoo.train.detection import CascadeMaskRCNN
from vizoo.train.detection.cascade import CascadeBoxBranch

STRIDES = (4, 8, 16, 32)
SIZE = (60, 64)


@pytest.fixture
def branch() -> CascadeBoxBranch:
    """A cascade that draws every proposal and moves boxes visibly."""
    cascade = CascadeBoxBranch(8, STRIDES, 3, convs=(8,), hidden=(16,), samples=10**6, positive_fraction=1.0)
    for stage in cascade.branches:
        torch.nn.init.normal_(stage.head.bbox_pred.weight, std=0.2)
        torch.nn.init.normal_(stage.head.cls_score.weight, std=0.5)
    return cascade


@pytest.fixture
def maps() -> list[Tensor]:
    return [torch.randn(1, 8, 64 // s, 64 // s) for s in STRIDES]


@pytest.fixture
def proposals() -> Tensor:
    corner = torch.rand(12, 2) * 30
    return torch.cat([corner, corner + 5 + 20 * torch.rand(12, 2)], dim=1)


TARGET = {"boxes": torch.tensor([[2.0, 4, 30, 40], [20.0, 8, 60, 30]]), "labels": torch.tensor([2, 0])}


def test_stages_differ_in_weights_and_thresholds(branch: CascadeBoxBranch) -> None:
    deviations = [[round(1 / w, 3) for w in stage.coder.weights] for stage in branch.branches]
    assert deviations == [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert [stage.sample.assigner.high_threshold for stage in branch.branches] == [0.5, 0.6, 0.7]
    assert all(stage.sample.assigner.low_quality_min is None for stage in branch.branches)
    assert all(stage.giou_weight == 10 for stage in branch.branches)


def test_training_refines_by_the_true_class_and_replaces_the_objects(
    branch: CascadeBoxBranch, maps: list[Tensor], proposals: Tensor
) -> None:
    losses, drawn = branch.loss(maps, [proposals], [TARGET], [SIZE])
    assert [set(found) for found in losses] == [{"loss_classifier", "loss_box_reg"}] * 3
    for index in (0, 1):
        before, after = drawn[index][0], drawn[index + 1][0]
        assert before.is_object.sum() == 2
        stage = branch.branches[index]
        logits, deltas = stage(maps, [before.boxes])
        moved = []
        for row in torch.where(~before.is_object)[0].tolist():
            label = int(before.labels[row])
            label = int(logits[row, :3].argmax()) if label == 3 else label
            codes = deltas[row, None, 4 * label : 4 * label + 4]
            moved.append(clip_boxes_to_image(stage.coder.decode_single(codes, before.boxes[row, None]), SIZE))
        torch.testing.assert_close(after.boxes, torch.cat([TARGET["boxes"], *moved]), atol=1e-4, rtol=1e-4)
        assert not after.boxes.requires_grad


def test_detection_takes_the_mean_logits_and_the_last_boxes(
    branch: CascadeBoxBranch, maps: list[Tensor], proposals: Tensor
) -> None:
    branch.eval()
    boxes, logits = proposals, []
    for index, stage in enumerate(branch.branches):
        found, deltas = stage(maps, [boxes])
        logits.append(found)
        if index < 2:
            label = found[:, :3].argmax(dim=1)
            own = deltas.view(len(boxes), 3, 4)[torch.arange(len(boxes)), label]
            boxes = clip_boxes_to_image(stage.coder.decode_single(own, boxes), SIZE)
    expected = branch.branches[2].select(sum(logits) / 3, deltas, [boxes], [SIZE])[0]
    got = branch.detect(maps, [proposals], [SIZE])[0]
    assert len(got.scores) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_stage_losses_are_weighted(make: Callable[..., Any], batch: dict[str, Any]) -> None:
    model = make(CascadeMaskRCNN).train()
    losses = {}
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.5, 0.25)):
        torch.manual_seed(0)
        model.stage_loss_weights = weights
        losses[weights] = model(**batch, mode="loss")
    plain, weighted = losses.values()
    for stage, weight in ((1, 1.0), (2, 0.5), (3, 0.25)):
        for name in ("loss_classifier", "loss_box_reg", "loss_mask"):
            key = f"stage{stage}_{name}"
            torch.testing.assert_close(weighted[key], weight * plain[key], atol=1e-6, rtol=1e-3)


def test_official_setting_of_the_first_stage(make: Callable[..., Any]) -> None:
    rpn = make(CascadeMaskRCNN, rpn={}).rpn
    assert (rpn.box_beta, rpn.allowed_border) == (1 / 9, 0.0)
    assert rpn.train().post_nms_top_n() == 2000
    assert make(CascadeMaskRCNN, rpn={"train_kept": 7}).rpn.train().post_nms_top_n() == 7


def test_stages_are_counted() -> None:
    with pytest.raises(ValueError, match="one IoU per stage, got 2 for 3"):
        CascadeBoxBranch(8, STRIDES, 3, stage_ious=(0.5, 0.6))
