"""mIoU against a loop over pixels, with ignored pixels, absent classes and padded samplers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from torch import Tensor

from vizoo.train.segmentation import metrics
from vizoo.train.segmentation.metrics import MeanIoU

CLASSES = 6


def samples(count: int, absent: int = -1) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        sides = (7 + i, 11 - i)
        target = torch.randint(CLASSES, sides)
        target[target == absent] = 0
        predicted = torch.where(torch.rand(sides) < 0.5, target, torch.randint(CLASSES, sides))
        predicted[predicted == absent] = 0
        target[torch.rand(sides) < 0.2] = 255
        found.append({"label_map": predicted, "target": target.to(torch.uint8), "path": f"{i}.png"})
    return found


def by_hand(found: list[dict[str, Any]]) -> tuple[dict[str, float], list[float]]:
    """Counts pixel by pixel, class by class."""
    pairs = [
        (int(t), int(p))
        for s in found
        for t, p in zip(s["target"].flatten(), s["label_map"].flatten(), strict=True)
        if t != 255
    ]
    iou, accuracy = [], []
    for c in range(CLASSES):
        both = sum(t == c and p == c for t, p in pairs)
        either = sum(c in pair for pair in pairs)
        labelled = sum(t == c for t, _ in pairs)
        iou.append(100 * both / either if either else math.nan)
        accuracy.append(100 * both / labelled if labelled else math.nan)
    right = sum(t == p for t, p in pairs)
    figures = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": 100 * right / len(pairs)}
    return figures, iou


def measure(found: list[dict[str, Any]], batch: int = 2) -> tuple[dict[str, float], MeanIoU]:
    metric = MeanIoU(CLASSES)
    for start in range(0, len(found), batch):
        metric.process(None, found[start : start + batch])
    return metric.evaluate(len(found)), metric


@pytest.mark.parametrize("absent", [-1, 3])
def test_equals_a_loop_over_pixels(absent: int) -> None:
    found = samples(5, absent)
    figures, metric = measure(found)
    expected, iou = by_hand(found)
    assert figures == pytest.approx(expected)
    assert [row["iou"] for row in metric.per_class] == pytest.approx(iou, nan_ok=True)
    assert metric.confusion is not None
    assert metric.confusion.dtype == torch.int64
    assert metric.confusion.sum() == sum((s["target"] != 255).sum() for s in found)
    assert math.isnan(metric.per_class[3]["iou"]) == (absent == 3)


def test_counts_over_the_set_not_per_image() -> None:
    big = {"label_map": torch.zeros(10, 10, dtype=torch.long), "target": torch.zeros(10, 10, dtype=torch.uint8)}
    small = {"label_map": torch.zeros(1, 1, dtype=torch.long), "target": torch.ones(1, 1, dtype=torch.uint8)}
    figures, _ = measure([big, small])
    assert figures == pytest.approx({"mIoU": 100 * (100 / 101) / 2, "mAcc": 50.0, "aAcc": 100 * 100 / 101})


def test_predictions_on_ignored_pixels_do_not_count() -> None:
    target = torch.tensor([[0, 255]], dtype=torch.uint8)
    figures, metric = measure([{"label_map": torch.tensor([[0, 5]]), "target": target}])
    assert figures["mIoU"] == 100.0
    assert math.isnan(metric.per_class[5]["iou"])


def test_repeats_of_padded_samplers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images on three processes: the third one's last is the first image again."""
    found = samples(5)
    expected, _ = measure(found)
    parts: list[Any] = []
    for rank, indices in enumerate(([0, 3], [1, 4], [2, 0])):
        monkeypatch.setattr(metrics, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(metrics, "all_gather_object", lambda mine: parts.append(mine) or [mine] * 3)
        process = MeanIoU(CLASSES)
        process.process(None, [found[i] for i in indices])
        with pytest.raises(ValueError, match="images"):
            process.evaluate(100)
    monkeypatch.setattr(metrics, "all_gather_object", lambda mine: parts)
    joined = MeanIoU(CLASSES)
    assert joined.evaluate(5) == expected


def test_a_process_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples(1)
    expected, _ = measure(found)
    metric = MeanIoU(CLASSES)
    metric.process(None, found)
    monkeypatch.setattr(metrics, "all_gather_object", lambda mine: [mine, (1, 0, None, None)])
    assert metric.evaluate(1) == expected


def test_a_second_evaluation_starts_at_nothing() -> None:
    found = samples(3)
    _, metric = measure(found)
    metric.process(None, found[:1])
    assert metric.evaluate(1) == pytest.approx(by_hand(found[:1])[0])


def test_classes_of_the_data_set() -> None:
    evaluator = Evaluator([MeanIoU()])
    evaluator.dataset_meta = {"classes": ["sky", "road"]}
    evaluator.process([{"label_map": torch.tensor([[0, 1]]), "target": torch.tensor([[0, 0]])}])
    assert evaluator.evaluate(1) == pytest.approx({"mIoU": 25.0, "mAcc": 50.0, "aAcc": 50.0})
    assert [row["class"] for row in evaluator.metrics[0].per_class] == ["sky", "road"]
    assert [row["pixels"] for row in evaluator.metrics[0].per_class] == [2, 0]


def sample(predicted: Tensor, target: Tensor | None) -> list[dict[str, Any]]:
    return [{"label_map": predicted, "target": target, "path": "street.png"}]


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (torch.zeros(2, 2), None, "street.png has no label map"),
        (torch.zeros(2, 2), torch.zeros(2, 3), r"street.png: the prediction \(2, 2\) must have the size of the labels"),
        (torch.zeros(1, 2), torch.tensor([[0, 6]]), r"labels must lie in 0..5, got 0..6"),
        (torch.tensor([[0, 9]]), torch.zeros(1, 2), r"predictions must lie in 0..5, got 0..9"),
    ],
)
def test_maps_that_do_not_fit(predicted: Tensor, target: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanIoU(CLASSES).process(None, sample(predicted, target))


def test_impossible_evaluations() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        MeanIoU(1)
    with pytest.raises(ValueError, match="needs num_classes, since the data set does not name"):
        MeanIoU().process(None, samples(1))
    metric = MeanIoU(CLASSES)
    metric.process(None, samples(3))
    with pytest.raises(ValueError, match="saw 3 of 4 images"):
        metric.evaluate(4)
    with pytest.raises(ValueError, match="saw 0 of 4 images"):
        metric.evaluate(4)
    metric.process(None, sample(torch.zeros(2, 2), torch.full((2, 2), 255)))
    with pytest.raises(ValueError, match="no pixel of the data set is labelled"):
        metric.evaluate(1)
