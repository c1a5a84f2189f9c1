"""Mean intersection over union and the accuracies of label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class MeanIoU(BaseMetric):
    """mIoU, mean accuracy of the classes and accuracy of the pixels, in percent, over labelled pixels.

    Pixels are counted over the whole data set in int64, then divided once. Classes that neither labels nor predictions
    hold are left out of the means. In a distributed run samplers repeat some images to give every process equally
    many. The repeats are dropped before anything is counted: the figures are those of one process.

    Args:
        num_classes: Classes of the labels; None takes those that the data set names.
        ignore_index: Label of pixels that do not count.

    Attributes:
        confusion: Pixels (classes, classes) of the last evaluation, row = true class.
        per_class: One dict per class of the last evaluation: `class`, `iou`, `accuracy` (percent, NaN where the class
            does not occur) and `pixels` labelled so.

    Raises:
        ValueError: Fewer than 2 classes.
    """

    default_prefix = "val"

    def __init__(self, num_classes: int | None = None, ignore_index: int = 255) -> None:
        super().__init__(prefix=None)
        self.prefix = None
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion: Tensor | None = None
        self.per_class: list[dict[str, Any]] = []
        self._sum: Tensor | None = None
        self._last: Tensor | None = None
        self._images = 0

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Count the pixels of every image.

        Args:
            data_batch: Not used.
            data_samples: Dicts with `label_map` and `target` (H, W), and `path` for messages.

        Raises:
            ValueError: A map without a target, of another size, or with classes that are not there.
        """
        for sample in data_samples:
            # The last image of a process may be a repeat, which only `evaluate` knows.
            if self._last is not None:
                self._sum = self._last if self._sum is None else self._sum + self._last
            self._last = self._count(sample["label_map"], sample["target"], sample.get("path"))
            self._images += 1

    def evaluate(self, size: int) -> dict[str, float]:
        """The figures over the whole data set.

        Args:
            size: Images in the data set; what samplers added beyond it is dropped.

        Returns:
            `mIoU`, `mAcc` and `aAcc` in percent.

        Raises:
            ValueError: Nothing was processed, or fewer images than the data set holds, or none with a label.
        """
        parts = all_gather_object((get_rank(), self._images, _on_cpu(self._sum), _on_cpu(self._last)))
        self._sum, self._last, self._images = None, None, 0
        seen, counts = 0, []
        for rank, images, total, last in parts:
            # Process r of n reads the images r, r + n, r + 2n, ...
            is_repeat = images > 0 and rank + (images - 1) * len(parts) >= size
            seen += images - is_repeat
            counts += [c for c in (total, None if is_repeat else last) if c is not None]
        if seen != size or size == 0:
            raise ValueError(f"the evaluation saw {seen} of {size} images: check the sampler of the data loader")
        return self.compute_metrics(counts)

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        """Figures from confusion matrices (classes, classes); sets `confusion` and `per_class`."""
        confusion = torch.stack(results).sum(0)
        if not confusion.sum():
            raise ValueError("no pixel of the data set is labelled, so there is nothing to measure")
        right, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        iou = 100.0 * right.double() / (labelled + predicted - right)
        accuracy = 100.0 * right.double() / labelled
        self.confusion = confusion
        self.per_class = self._table(iou, accuracy, labelled)
        return {
            "mIoU": iou.nanmean().item(),
            "mAcc": accuracy.nanmean().item(),
            "aAcc": (100.0 * right.sum().double() / confusion.sum()).item(),
        }

    def _table(self, iou: Tensor, accuracy: Tensor, labelled: Tensor) -> list[dict[str, Any]]:
        names = (self.dataset_meta or {}).get("classes") or [str(i) for i in range(len(iou))]
        rows = zip(names, iou.tolist(), accuracy.tolist(), labelled.tolist(), strict=True)
        return [dict(zip(("class", "iou", "accuracy", "pixels"), row, strict=True)) for row in rows]

    def _classes(self) -> int:
        if self.num_classes is None:
            names = (self.dataset_meta or {}).get("classes")
            if not names:
                raise ValueError("MeanIoU needs num_classes, since the data set does not name its classes")
            return len(names)
        return self.num_classes

    def _count(self, predicted: Tensor, target: Tensor | None, path: str | None) -> Tensor:
        """Confusion matrix of one image, on the device of the prediction."""
        n, title = self._classes(), path or "an image"
        if target is None:
            raise ValueError(f"{title} has no label map to compare with")
        if predicted.shape != target.shape:
            raise ValueError(
                f"{title}: the prediction {tuple(predicted.shape)} must have the size of the labels "
                f"{tuple(target.shape)}"
            )
        target = target.to(predicted.device).long()
        labelled = target != self.ignore_index
        target, predicted = target[labelled], predicted[labelled].long()
        for what, found in (("labels", target), ("predictions", predicted)):
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < n:
                raise ValueError(f"{title}: {what} must lie in 0..{n - 1}, got {int(found.min())}..{int(found.max())}")
        return torch.bincount(target * n + predicted, minlength=n * n).view(n, n)


def _on_cpu(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.cpu()
