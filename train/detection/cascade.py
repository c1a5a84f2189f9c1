"""Cascade R-CNN: three second stages, each trained on, and applied to, the boxes of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .boxes import Detections
from .roi_heads import BoxBranch
from .sampling import Samples

# 1 / standard deviations of the deltas; they shrink as boxes improve.
WEIGHTS = (
    (10.0, 10.0, 5.0, 5.0),
    (20.0, 20.0, 10.0, 10.0),
    (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
)
POSITIVE_IOU = (0.5, 0.6, 0.7)


class CascadeBoxBranch(nn.Module):
    """Three box branches in a row, as mmdetection 2.11's CascadeRoIHead in the official Swin setting.

    Args:
        channels: Channels of the pyramid.
        strides: Input pixels per position of the levels that are pooled from.
        num_classes: Classes of objects.
        stage_weights: See `BoxCoder`, per stage.
        stage_ious: Least IoU of a positive proposal, per stage.
        convs: See `BoxHead`.
        hidden: See `BoxHead`.
        giou_weight: See `BoxBranch`.
        **options: Further arguments of every stage's `BoxBranch`.

    Raises:
        ValueError: Not one IoU per group of weights.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        stage_weights: Sequence[tuple[float, float, float, float]] = WEIGHTS,
        stage_ious: Sequence[float] = POSITIVE_IOU,
        convs: Sequence[int] = (256,) * 4,
        hidden: Sequence[int] = (1024,),
        giou_weight: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if len(stage_weights) != len(stage_ious):
            raise ValueError(f"a cascade needs one IoU per stage, got {len(stage_ious)} for {len(stage_weights)}")
        shared = {"low_quality_min": None, "convs": convs, "hidden": hidden, "giou_weight": giou_weight, **options}
        self.stages = nn.ModuleList(
            BoxBranch(channels, strides, num_classes, weights=weights, positive_iou=iou, **shared)
            for weights, iou in zip(stage_weights, stage_ious, strict=True)
        )

    @property
    def branches(self) -> list[BoxBranch]:
        """The stages, in order."""
        return [cast(BoxBranch, stage) for stage in self.stages]

    def loss(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[dict[str, Tensor]], list[list[Samples]]]:
        """Losses of every stage, not weighted, and the boxes each was computed on."""
        losses, drawn = [], []
        for stage in self.branches:
            samples = [stage.sample(p, t) for p, t in zip(proposals, targets, strict=True)]
            logits, deltas = stage(maps, [s.boxes for s in samples])
            losses.append(stage.losses(logits, deltas, samples))
            drawn.append(samples)
            proposals = _next_proposals(stage, logits, deltas, samples, sizes)
        return losses, drawn

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Final boxes of each image: the last stage's, scored by the mean of all stages' logits."""
        scores = []
        for index, stage in enumerate(self.branches):
            logits, deltas = stage(maps, proposals)
            scores.append(logits)
            if index < len(self.stages) - 1:
                proposals = self.refine(index, logits, deltas, proposals, sizes)
        return stage.select(torch.stack(scores).mean(dim=0), deltas, proposals, sizes)

    def refine(
        self,
        index: int,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """The boxes of stage `index` + 1: those of stage `index`, refined by their best class of objects."""
        counts = [len(b) for b in boxes]
        labels = logits[:, :-1].argmax(dim=1).split(counts)
        stage = self.branches[index]
        return [stage.refine(*each) for each in zip(deltas.split(counts), labels, boxes, sizes, strict=True)]


@torch.no_grad()
def _next_proposals(
    stage: BoxBranch, logits: Tensor, deltas: Tensor, samples: Sequence[Samples], sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """What the next stage is trained on: boxes refined by their true class, without the objects' own boxes."""
    counts = [len(s.boxes) for s in samples]
    best = logits[:, :-1].argmax(dim=1).split(counts)
    found = []
    for codes, guess, s, size in zip(deltas.split(counts), best, samples, sizes, strict=True):
        labels = torch.where(s.positive, s.labels, guess)
        found.append(stage.refine(codes, labels, s.boxes, size)[~s.is_object])
    return found
