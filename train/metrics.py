"""Top-k accuracy and the confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the confusion matrix.

    In a distributed run samplers repeat some images to give every process equally many. The repeats are dropped
    before anything is counted: the figures are those of one process.

    Args:
        topk: The k of top-k; a k above the number of classes is left out.
        confusion_limit: Largest number of classes for which the confusion matrix is kept.

    Attributes:
        confusion: Counts (classes, classes) of the last evaluation, row = true class; None above the limit.
    """

    default_prefix = "val"

    def __init__(self, topk: Sequence[int] = (1, 5), confusion_limit: int = 1000) -> None:
        super().__init__(prefix=None)
        self.prefix = None
        self.topk = tuple(topk)
        self.confusion_limit = confusion_limit
        self.confusion: Tensor | None = None
        self._classes = 0

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep label, rank of the label among the logits, prediction and loss of every image.

        Args:
            data_batch: Not used.
            data_samples: Dicts with `logits` (B, classes) and `label` (B,).
        """
        for sample in data_samples:
            logits, label = sample["logits"].float(), sample["label"].to(sample["logits"].device)
            self._classes = logits.shape[1]
            own = logits.gather(1, label[:, None])
            # An equal logit counts before the label, so a model that gives all classes one value gets no credit.
            rank = (logits > own).sum(1) + ((logits == own).sum(1) - 1)
            loss = F.cross_entropy(logits, label, reduction="none").double()
            row = torch.stack([label.double(), rank.double(), logits.argmax(1).double(), loss], dim=1)
            self.results.append(row)

    def evaluate(self, size: int) -> dict[str, float]:
        """The figures over the whole data set.

        Args:
            size: Images in the data set; what samplers added beyond it is dropped.

        Returns:
            `top1`, `top5` (percent) and `loss`.

        Raises:
            ValueError: Nothing was processed, or fewer images than the data set holds.
        """
        mine = torch.cat(self.results).cpu() if self.results else torch.zeros(0, 4, dtype=torch.float64)
        self.results.clear()
        rows = _interleave(all_gather_object(mine))[:size]
        if len(rows) < size or size == 0:
            raise ValueError(f"the evaluation saw {len(rows)} of {size} images: check the sampler of the data loader")
        return self.compute_metrics(list(rows))

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        """Accuracies, loss and confusion matrix from one row (label, rank, prediction, loss) per image."""
        rows = torch.stack(results)
        label, rank, predicted = rows[:, :3].long().unbind(1)
        self.confusion = self._count(label, predicted)
        figures = {f"top{k}": 100.0 * (rank < k).double().mean().item() for k in self.topk if k <= self._classes}
        return {**figures, "loss": rows[:, 3].mean().item()}

    def _count(self, label: Tensor, predicted: Tensor) -> Tensor | None:
        n = self._classes
        if n > self.confusion_limit:
            return None
        return torch.bincount(label * n + predicted, minlength=n * n).view(n, n)


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """Rows in the order of the data set, when process r of n evaluated the images r, r + n, r + 2n, ..."""
    order = torch.cat([torch.arange(len(part)) * len(parts) + index for index, part in enumerate(parts)])
    return torch.cat(list(parts))[order.argsort()]
