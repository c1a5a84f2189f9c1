"""Accuracy and confusion matrix by hand, with ties, with padded samplers."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor

from vizoo.train import metrics
from vizoo.train.metrics import Accuracy


def feed(metric: Accuracy, logits: Tensor, label: Tensor, batch: int = 4) -> None:
    for start in range(0, len(label), batch):
        part = slice(start, start + batch)
        metric.process(None, [{"logits": logits[part], "label": label[part]}])


def test_equals_sklearns_figures() -> None:
    logits, label = torch.randn(50, 7), torch.randint(7, (50,))
    metric = Accuracy()
    feed(metric, logits, label)
    found = metric.evaluate(50)
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(label.numpy(), logits.numpy(), k=k, labels=range(7))
        assert found[f"top{k}"] == pytest.approx(expected)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-6)
    expected = confusion_matrix(label.numpy(), logits.argmax(1).numpy(), labels=range(7))
    assert metric.confusion is not None
    assert metric.confusion.tolist() == expected.tolist()


def test_a_model_that_says_nothing_gets_no_credit() -> None:
    metric = Accuracy(topk=(1, 2))
    feed(metric, torch.zeros(10, 3), torch.zeros(10, dtype=torch.long))
    assert metric.evaluate(10) == pytest.approx({"top1": 0.0, "top2": 0.0, "loss": 1.0986123})


def test_top5_of_three_classes_is_left_out() -> None:
    metric = Accuracy()
    feed(metric, torch.eye(3), torch.arange(3))
    assert metric.evaluate(3).keys() == {"top1", "loss"}


def test_a_second_evaluation_starts_at_nothing() -> None:
    metric = Accuracy()
    feed(metric, torch.eye(3), torch.arange(3))
    assert metric.evaluate(3)["top1"] == 100.0
    feed(metric, torch.eye(3).roll(1, 0), torch.arange(3))
    assert metric.evaluate(3)["top1"] == 0.0


def test_repeats_of_padded_samplers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images on two processes: the second one's last is the first image again."""
    logits, label = torch.randn(5, 4), torch.randint(4, (5,))
    whole = Accuracy()
    feed(whole, logits, label)
    expected = whole.evaluate(5)
    parts = []
    for indices in ([0, 2, 4], [1, 3, 0]):
        process = Accuracy()
        feed(process, logits[indices], label[indices], batch=2)
        parts.append(torch.cat(process.results))
    monkeypatch.setattr(metrics, "all_gather_object", lambda mine: parts)
    joined = Accuracy()
    feed(joined, logits[:1], label[:1])
    assert joined.evaluate(5) == pytest.approx(expected)
    assert joined.confusion is not None
    assert joined.confusion.sum() == 5


def test_large_label_sets_get_no_matrix() -> None:
    metric = Accuracy(confusion_limit=3)
    feed(metric, torch.eye(4), torch.arange(4))
    metric.evaluate(4)
    assert metric.confusion is None


def test_half_precision_logits() -> None:
    metric = Accuracy()
    feed(metric, torch.eye(6).bfloat16(), torch.arange(6))
    assert metric.evaluate(6)["top1"] == 100.0


def test_images_that_were_not_seen() -> None:
    metric = Accuracy()
    feed(metric, torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="saw 3 of 4 images"):
        metric.evaluate(4)
    with pytest.raises(ValueError, match="saw 0 of 4 images"):
        metric.evaluate(4)
