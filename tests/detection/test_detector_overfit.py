"""Each detector learns one batch by heart: its losses, targets and predictions agree with one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from vizoo.train.detection import CascadeMaskRCNN, Detector, FasterRCNN, MaskRCNN, RetinaNet

Batch = dict[str, Any]
Make = Callable[..., Detector]

# Updates, learning rate, and how many times smaller the loss must become.
COURSES = {
    FasterRCNN: (60, 2e-3, 4),
    MaskRCNN: (80, 2e-3, 6),
    CascadeMaskRCNN: (80, 2e-3, 8),
    RetinaNet: (160, 4e-3, 4),
}


def train(model: Detector, batch: Batch, steps: int, rate: float) -> tuple[float, float]:
    """First and last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0)
    totals = []
    for _ in range(steps):
        total = torch.stack(list(model(**batch, mode="loss").values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        totals.append(total.item())
    return totals[0], totals[-1]


def mask_iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("kind", COURSES, ids=lambda kind: kind.__name__)
def test_one_batch_is_learnt(kind: type[Detector], make: Make, batch: Batch) -> None:
    steps, rate, factor = COURSES[kind]
    model = make(kind).train()
    first, last = train(model, batch, steps, rate)
    assert last < first / factor
    with torch.no_grad():
        found = model.eval()(**batch, mode="predict")
    for prediction, target in zip(found, batch["targets"], strict=True):
        for index, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
            best = torch.where(prediction["labels"] == label)[0][0]  # best first
            assert prediction["scores"][best] > 0.3
            assert box_iou(prediction["boxes"][best, None], box[None]) > 0.7
            if kind.needs_masks:
                assert mask_iou(prediction["masks"][best], target["masks"][index].bool()) > 0.7
