"""The second stage: a class, a refined box and a mask for each proposal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from .boxes import BoxCoder, Detections, suppress
from .heads import BoxHead, MaskHead
from .masks import mask_targets, paste
from .pooling import RoIPooler
from .sampling import RoISampler, Samples


class BoxBranch(nn.Module):
    """Pools proposals, classifies and refines them, as mmdetection 2.11's StandardRoIHead.

    Args:
        channels: Channels of the pyramid.
        strides: Input pixels per position of the levels that are pooled from.
        num_classes: Classes of objects.
        convs: See `BoxHead`.
        hidden: See `BoxHead`.
        norm: See `BoxHead`.
        size: Side of the pooled features.
        sampling_ratio: See `RoIPooler`.
        aligned: See `RoIPooler`.
        weights: See `BoxCoder`.
        positive_iou: Least IoU of a positive proposal.
        low_quality_min: See `RoISampler`.
        samples: Proposals drawn per image, in training.
        positive_fraction: Largest share of positive ones.
        box_beta: Where the box loss turns from quadratic to linear; 0 is L1.
        giou_weight: Weight of the generalised IoU loss of decoded boxes that then replaces the loss of deltas; 0 keeps
            the latter. The cascade has 10.
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
        convs: Sequence[int] = (),
        hidden: Sequence[int] = (1024, 1024),
        norm: str = "batch",
        size: int = 7,
        sampling_ratio: int = 0,
        aligned: bool = True,
        weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        positive_iou: float = 0.5,
        low_quality_min: float | None = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        box_beta: float = 0.0,
        giou_weight: float = 0.0,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pooler = RoIPooler(size, strides, sampling_ratio=sampling_ratio, aligned=aligned)
        self.head = BoxHead(channels, num_classes, size=size, convs=convs, hidden=hidden, norm=norm)
        self.coder = BoxCoder(weights)
        self.sample = RoISampler(
            num_classes,
            positive_iou=positive_iou,
            low_quality_min=low_quality_min,
            count=samples,
            positive_fraction=positive_fraction,
        )
        self.box_beta = box_beta
        self.giou_weight = giou_weight
        self.score_threshold = score_threshold
        self.nms = nms
        self.max_detections = max_detections

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, num_classes + 1) and deltas (n, num_classes * 4) of the boxes (n_i, 4) of each image."""
        return self.head(self.pooler(maps, boxes))

    def loss(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Samples]]:
        """Losses, and the proposals they were computed on."""
        samples = [self.sample(p, t) for p, t in zip(proposals, targets, strict=True)]
        logits, deltas = self(maps, [s.boxes for s in samples])
        return self.losses(logits, deltas, samples), samples

    def losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Samples]) -> dict[str, Tensor]:
        """Cross-entropy and box loss, both divided by the number of sampled boxes of the batch."""
        labels, boxes, truth = (torch.cat([getattr(s, name) for s in samples]) for name in ("labels", "boxes", "truth"))
        count = max(1, len(labels))
        classes = F.cross_entropy(logits, labels, reduction="sum") / count
        positive = torch.where(labels < self.num_classes)[0]
        own = of_class(deltas, labels[positive], positive)
        return {
            "loss_classifier": classes,
            "loss_box_reg": self._box_loss(own, boxes[positive], truth[positive]) / count,
        }

    def _box_loss(self, deltas: Tensor, boxes: Tensor, truth: Tensor) -> Tensor:
        """Sum over positive boxes (n, 4) with the deltas of their class (n, 4)."""
        if self.giou_weight:
            decoded = self.coder.decode_single(deltas, boxes)
            return self.giou_weight * generalized_box_iou_loss(decoded, truth, reduction="sum", eps=1e-6)
        return F.smooth_l1_loss(deltas, self.coder.encode_single(truth, boxes), beta=self.box_beta, reduction="sum")

    def decode(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Refined boxes (n, num_classes, 4), not clipped."""
        return self.coder.decode_single(deltas, boxes).view(len(boxes), -1, 4)

    def refine(self, deltas: Tensor, labels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes (n, 4) refined by the deltas of one class each, clipped to the image."""
        return clip_boxes_to_image(self.coder.decode_single(of_class(deltas, labels), boxes), size)

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Final boxes of each image, in input pixels."""
        logits, deltas = self(maps, proposals)
        return self.select(logits, deltas, proposals, sizes)

    def select(
        self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """The best detections of each image, from what the head gives for its proposals."""
        counts = [len(p) for p in proposals]
        scores = logits.softmax(dim=1)[:, :-1].split(counts)
        found = []
        for own, codes, boxes, size in zip(scores, deltas.split(counts), proposals, sizes, strict=True):
            box, label = torch.where(own > self.score_threshold)
            refined = self.refine(codes[box], label, boxes[box], size)
            found.append(suppress(refined, own[box, label], label, nms=self.nms, limit=self.max_detections))
        return found


class MaskBranch(nn.Module):
    """Pools detections and draws their masks, as mmdetection 2.11's StandardRoIHead and CascadeRoIHead.

    Args:
        channels: Channels of the pyramid.
        strides: Input pixels per position of the levels that are pooled from.
        num_classes: Classes of objects.
        stages: Mask heads: one per stage of a cascade. Their probabilities are averaged.
        hidden: See `MaskHead`.
        norm: See `MaskHead`.
        size: Side of the pooled features; masks are twice as large.
        sampling_ratio: See `RoIPooler`.
        aligned: See `RoIPooler`.
        target_threshold: Share of a cell that an object must cover to count, in training.
        threshold: Least probability of a mask's pixel.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        stages: int = 1,
        hidden: Sequence[int] = (256,) * 4,
        norm: str | None = None,
        size: int = 14,
        sampling_ratio: int = 0,
        aligned: bool = True,
        target_threshold: float = 0.5,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.pooler = RoIPooler(size, strides, sampling_ratio=sampling_ratio, aligned=aligned)
        self.heads = nn.ModuleList(MaskHead(channels, num_classes, hidden=hidden, norm=norm) for _ in range(stages))
        self.target_threshold = target_threshold
        self.threshold = threshold

    def loss(
        self,
        maps: Sequence[Tensor],
        samples: Sequence[Samples],
        targets: Sequence[Mapping[str, Tensor]],
        stage: int = 0,
    ) -> dict[str, Tensor]:
        """Cross-entropy of the true class's mask, mean over the positive ones of the boxes drawn and over pixels."""
        logits = self.heads[stage](self.pooler(maps, [s.boxes[s.positive] for s in samples]))
        wanted = [self._targets(s, t, logits.shape[-1]) for s, t in zip(samples, targets, strict=True)]
        own = _of_label(logits, torch.cat([s.labels[s.positive] for s in samples]))
        total = F.binary_cross_entropy_with_logits(own, torch.cat(wanted), reduction="sum")
        return {"loss_mask": total / max(1, own.numel())}

    def _targets(self, samples: Samples, target: Mapping[str, Tensor], size: int) -> Tensor:
        boxes, objects = samples.boxes[samples.positive], samples.objects[samples.positive]
        return mask_targets(target["masks"], objects, boxes, size, threshold=self.target_threshold)

    def detect(self, maps: Sequence[Tensor], found: Sequence[Detections]) -> list[Tensor]:
        """Probabilities (n, 2 size, 2 size) inside the box of each detection, for every image."""
        pooled = self.pooler(maps, [f.boxes for f in found])
        labels = torch.cat([f.labels for f in found])
        masks = torch.stack([_of_label(head(pooled), labels).sigmoid() for head in self.heads]).mean(dim=0)
        return list(masks.split([len(f.labels) for f in found]))

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels (n, height, width) covered by masks (n, S, S) of boxes (n, 4) in a canvas of this size."""
        return paste(masks, boxes, size, threshold=self.threshold)


def _of_label(maps: Tensor, labels: Tensor) -> Tensor:
    """The map (n, S, S) of one class each, from maps (n, num_classes, S, S)."""
    return maps[torch.arange(len(labels), device=labels.device), labels]


def of_class(deltas: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
    """The deltas (n, 4) of one class each, from deltas (N, num_classes * 4); `rows` (n,) chooses among the N."""
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)[rows, labels]
