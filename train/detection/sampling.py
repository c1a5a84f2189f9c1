"""Which proposals the second stage learns from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from .boxes import NEGATIVE, Assigner


class Samples(NamedTuple):
    """The boxes of one image that a head learns from.

    Attributes:
        boxes: Boxes (n, 4).
        labels: Class (n,); `num_classes` for background.
        objects: Index (n,) of each box's object among the image's; 0 for background.
        truth: Boxes (n, 4) of those objects; the sampled box itself for background.
        is_object: Whether the box is an object's own (n,), added to the proposals.
        positive: Whether it is no background (n,).
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    truth: Tensor
    is_object: Tensor
    positive: Tensor


class RoISampler:
    """Assigns proposals to objects, adds the objects' own boxes, and draws a fixed number, as mmdetection.

    Args:
        num_classes: Classes of objects.
        positive_iou: Least IoU of a positive proposal; all others are background.
        low_quality_min: See `Assigner`; 0.5 in Mask R-CNN (it decides ties only), None in the cascade.
        count: Boxes drawn per image.
        positive_fraction: Largest share of positive ones.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        positive_iou: float = 0.5,
        low_quality_min: float | None = 0.5,
        count: int = 512,
        positive_fraction: float = 0.25,
    ) -> None:
        self.num_classes = num_classes
        self.assigner = Assigner(positive_iou, positive_iou, low_quality_min)
        self.draw = BalancedPositiveNegativeSampler(count, positive_fraction)

    def __call__(self, proposals: Tensor, target: Mapping[str, Tensor]) -> Samples:
        """Draw from proposals (n, 4) and the target's `boxes` (m, 4) with `labels` (m,)."""
        objects = target["boxes"]
        own = torch.arange(len(objects), device=objects.device)
        owner = torch.cat([own, self.assigner.assign(objects, proposals)])
        boxes = torch.cat([objects, proposals])
        positive, negative = self.draw([(owner > NEGATIVE).long()])
        chosen = torch.where(positive[0] | negative[0])[0]
        return self._samples(boxes[chosen], owner[chosen], chosen < len(objects), target)

    def _samples(self, boxes: Tensor, owner: Tensor, is_object: Tensor, target: Mapping[str, Tensor]) -> Samples:
        positive = owner >= 0
        index = owner.clamp(min=0)
        if len(target["boxes"]) == 0:
            return Samples(boxes, torch.full_like(index, self.num_classes), index, boxes, is_object, positive)
        labels = torch.where(positive, target["labels"][index], self.num_classes)
        truth = torch.where(positive[:, None], target["boxes"][index], boxes)
        return Samples(boxes, labels, index, truth, is_object, positive)
