"""RetinaNet's losses over a batch, its candidates, and its pyramid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vizoo
from vizoo.train.detection.boxes import IGNORED
from vizoo.train.detection.neck import Pyramid
from vizoo.train.detection.retinanet import DenseBranch

STRIDES = (8, 16)


def branch(**options: Any) -> DenseBranch:
    return DenseBranch(8, STRIDES, 3, **options)


@pytest.fixture
def maps() -> list[Tensor]:
    return [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]


def test_prior_of_one_percent(maps: list[Tensor]) -> None:
    logits, deltas = branch()(maps)
    assert logits.shape == (2, 9 * (64 + 16), 3)
    assert deltas.shape == (2, 9 * (64 + 16), 4)
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)


def test_losses_are_divided_over_the_whole_batch(maps: list[Tensor]) -> None:
    model = branch(anchor_scale=2.0)
    targets = [
        {"boxes": torch.tensor([[2.0, 4, 30, 40], [20.0, 8, 60, 30]]), "labels": torch.tensor([2, 0])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model.loss(maps, targets)
    logits, deltas = model(maps)
    anchors = torch.cat(model.anchors(maps))
    owners = [model.assigner.assign(t["boxes"], anchors) for t in targets]
    positive = owners[0] >= 0
    count = int(positive.sum()) + 1  # the image without objects counts 1
    wanted = torch.zeros_like(logits)
    wanted[0, positive, targets[0]["labels"][owners[0][positive]]] = 1
    probability = logits.sigmoid()
    right = torch.where(wanted > 0, probability, 1 - probability)
    alpha = torch.where(wanted > 0, 0.25, 0.75)
    focal = -alpha * (1 - right) ** 2 * right.log()
    counted = torch.stack(owners) != IGNORED
    torch.testing.assert_close(losses["loss_classifier"], focal[counted].sum() / count)
    goal = model.coder.encode_single(targets[0]["boxes"][owners[0][positive]], anchors[positive])
    torch.testing.assert_close(losses["loss_box_reg"], F.l1_loss(deltas[0, positive], goal, reduction="sum") / count)


def test_candidates_are_pairs_or_whole_anchors() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.85, 0.01, 0.01], [0.6, 0.5, 0.4]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]])
    found = {
        whole: branch(per_level=2, whole_anchors=whole)._candidates(scores, torch.zeros(3, 4), anchors, (64, 64))
        for whole in (False, True)
    }
    torch.testing.assert_close(found[False].scores, torch.tensor([0.9, 0.85]))
    torch.testing.assert_close(found[True].scores.sort().values, torch.tensor([0.7, 0.8, 0.85, 0.9]))


def test_candidates_without_extent_are_dropped_on_request() -> None:
    scores = torch.full((2, 3), 0.5)
    anchors = torch.tensor([[0.0, 0, 10, 10], [70.0, 0, 80, 10]])  # the second leaves the image
    for drop, count in ((True, 3), (False, 6)):
        assert len(branch(drop_empty=drop)._candidates(scores, torch.zeros(2, 4), anchors, (64, 64)).boxes) == count


def test_extra_levels_come_from_the_backbone_without_relu(tiny: dict[str, Any]) -> None:
    backbone = vizoo.create_model(**tiny, features_only=True, out_indices=(1, 2, 3))
    neck = Pyramid(backbone, 128, extra_convs=True)  # as many channels as the last map
    assert neck.strides == (8, 16, 32, 64, 128)
    maps = [torch.randn(1, c, s, s) for c, s in ((32, 8), (64, 4), (128, 2))]
    levels = neck(maps)
    assert [m.shape[-1] for m in levels] == [8, 4, 2, 1, 1]
    sixth = neck.extra_blocks.p6(maps[-1])
    torch.testing.assert_close(levels[3], sixth)
    torch.testing.assert_close(levels[4], neck.extra_blocks.p7(sixth))
    neck.extra_blocks.relu = True
    torch.testing.assert_close(neck(maps)[4], neck.extra_blocks.p7(sixth.relu()))
