"""RetinaNet's single stage: classes and boxes straight from anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import clip_boxes_to_image, sigmoid_focal_loss

from .anchors import RATIOS, Anchors
from .boxes import IGNORED, Assigner, BoxCoder, Detections, not_empty, suppress


class DenseBranch(nn.Module):
    """Classifies and refines every anchor of every level, as mmdetection 3.3's RetinaHead.

    Args:
        channels: Channels of the pyramid.
        strides: Input pixels per position of each level.
        num_classes: Classes of objects; there is no background.
        anchor_scale: Square root of the smallest anchor's area over its level's stride.
        octaves: Anchor sizes per level, a factor 2^(1 / octaves) apart.
        ratios: Heights over widths of the anchors.
        positive_iou: Least IoU of a positive anchor.
        negative_iou: IoU below which an anchor is negative.
        low_quality_min: Least best overlap with which an object takes its best anchors.
        focal_alpha: Weight of positives in the focal loss.
        focal_gamma: Its exponent.
        box_beta: Where the box loss turns from quadratic to linear; 0 is L1.
        per_level: Candidates kept per level.
        whole_anchors: Count candidates in anchors, by their best class, as mmdetection 2.11; later versions count
            pairs of anchor and class.
        drop_empty: Drop candidates without width or height; 2.11 keeps them.
        score_threshold: Least score of a detection; scores must exceed it.
        nms: Largest IoU of two detections of one class.
        max_detections: Detections per image.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        anchor_scale: float = 4.0,
        octaves: int = 3,
        ratios: Sequence[float] = RATIOS,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        low_quality_min: float = 0.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_beta: float = 0.0,
        per_level: int = 1000,
        whole_anchors: bool = False,
        drop_empty: bool = True,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.anchors = Anchors.by_scale(strides, anchor_scale, octaves, ratios)
        self.head = RetinaNetHead(channels, octaves * len(ratios), num_classes)
        self.coder = BoxCoder()
        self.assigner = Assigner(positive_iou, negative_iou, low_quality_min)
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_beta = box_beta
        self.per_level = per_level
        self.whole_anchors = whole_anchors
        self.drop_empty = drop_empty
        self.score_threshold = score_threshold
        self.nms = nms
        self.max_detections = max_detections

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, anchors, num_classes) and deltas (B, anchors, 4), float32, over all levels."""
        found = self.head(list(maps))
        return found["cls_logits"].float(), found["bbox_regression"].float()

    def loss(self, maps: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Focal loss and box loss, both divided by the positive anchors of the batch (at least 1 for each image).

        torchvision divides image by image, then averages.
        """
        logits, deltas = self(maps)
        anchors = torch.cat(self.anchors(maps))
        owners = [self.assigner.assign(t["boxes"], anchors) for t in targets]
        count = sum(int((owner >= 0).sum().clamp(min=1)) for owner in owners)
        parts = [self._image_loss(*each, anchors) for each in zip(logits, deltas, owners, targets, strict=True)]
        classes, boxes = (torch.stack(values).sum() / count for values in zip(*parts, strict=True))
        return {"loss_classifier": classes, "loss_box_reg": boxes}

    def _image_loss(
        self, logits: Tensor, deltas: Tensor, owner: Tensor, target: Mapping[str, Tensor], anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over one image's anchors."""
        positive = torch.where(owner >= 0)[0]
        objects = owner[positive]
        wanted = torch.zeros_like(logits)
        wanted[positive, target["labels"][objects]] = 1
        counted = owner != IGNORED
        focal = sigmoid_focal_loss(logits[counted], wanted[counted], self.focal_alpha, self.focal_gamma, "sum")
        goal = self.coder.encode_single(target["boxes"][objects], anchors[positive])
        return focal, F.smooth_l1_loss(deltas[positive], goal, beta=self.box_beta, reduction="sum")

    def detect(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Final boxes of each image, in input pixels."""
        logits, deltas = self(maps)
        anchors = self.anchors(maps)
        return [self._detect_image(*each, anchors) for each in zip(logits.sigmoid(), deltas, sizes, strict=True)]

    def _detect_image(
        self, scores: Tensor, deltas: Tensor, size: tuple[int, int], anchors: Sequence[Tensor]
    ) -> Detections:
        counts = [len(level) for level in anchors]
        levels = zip(scores.split(counts), deltas.split(counts), anchors, strict=True)
        found = [self._candidates(*level, size) for level in levels]
        boxes, best, labels = (torch.cat(values) for values in zip(*found, strict=True))
        return suppress(boxes, best, labels, nms=self.nms, limit=self.max_detections)

    def _candidates(self, scores: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int]) -> Detections:
        """The best pairs of anchor and class of one level, decoded."""
        if self.whole_anchors and len(scores) > self.per_level:
            best = scores.amax(dim=1).topk(self.per_level).indices
            scores, deltas, anchors = scores[best], deltas[best], anchors[best]
        anchor, label = torch.where(scores > self.score_threshold)
        score = scores[anchor, label]
        if not self.whole_anchors and len(score) > self.per_level:
            score, best = score.topk(self.per_level)
            anchor, label = anchor[best], label[best]
        boxes = clip_boxes_to_image(self.coder.decode_single(deltas[anchor], anchors[anchor]), size)
        keep = not_empty(boxes) if self.drop_empty else slice(None)
        return Detections(boxes[keep], score[keep], label[keep])
