"""The first stage: boxes that may hold an object, of any class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from .anchors import RATIOS, Anchors
from .boxes import IGNORED, Assigner, BoxCoder

SMALLEST = torch.finfo(torch.float32).tiny


class Scored(NamedTuple):
    """What the first stage computes for a batch.

    Attributes:
        objectness: Logits (B, anchors).
        deltas: (B * anchors, 4).
        anchors: (anchors, 4), all levels.
        per_level: Anchors of each level.
    """

    objectness: Tensor
    deltas: Tensor
    anchors: Tensor
    per_level: list[int]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network with the numbers and targets of mmdetection 2.11.

    Args:
        channels: Channels of the pyramid.
        strides: Input pixels per position of each level.
        anchor_scale: Square root of an anchor's area over its level's stride.
        ratios: Heights over widths of the anchors.
        depth: 3 x 3 convolutions in front of the classifier.
        train_per_level: Best boxes of a level that go into suppression, in training.
        test_per_level: The same, else.
        train_kept: Proposals per image in training: 1000, in the cascade 2000.
        test_kept: Proposals per image else.
        nms: Largest IoU of two proposals of one level.
        drop_empty: Drop proposals without width or height, as mmdetection 3.3.
        positive_iou: Least IoU of a positive anchor.
        negative_iou: IoU below which an anchor is negative.
        low_quality_min: Least best IoU with which an object takes its best anchors.
        samples: Anchors drawn per image.
        positive_fraction: Largest share of positive ones.
        box_beta: Where the box loss turns from quadratic to linear: 0 (L1) in Mask R-CNN, 1/9 in the cascade.
        allowed_border: Anchors that leave the image by more pixels are not trained; None trains all. Mask R-CNN has
            None, the cascade 0.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchor_scale: float = 8.0,
        ratios: Sequence[float] = RATIOS,
        depth: int = 1,
        train_per_level: int = 2000,
        test_per_level: int = 1000,
        train_kept: int = 1000,
        test_kept: int = 1000,
        nms: float = 0.7,
        drop_empty: bool = False,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        low_quality_min: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
        box_beta: float = 0.0,
        allowed_border: float | None = None,
    ) -> None:
        super().__init__(
            Anchors.by_scale(strides, anchor_scale, ratios=ratios),
            RPNHead(channels, len(ratios), depth),
            positive_iou,
            negative_iou,
            samples,
            positive_fraction,
            {"training": train_per_level, "testing": test_per_level},
            {"training": train_kept, "testing": test_kept},
            nms,
        )
        self.proposal_matcher = Assigner(positive_iou, negative_iou, low_quality_min)
        self.box_coder = BoxCoder()
        self.min_size = SMALLEST if drop_empty else 0.0  # torchvision keeps sides >= min_size
        self.box_beta = box_beta
        self.allowed_border = allowed_border

    def forward(
        self,
        maps: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (n, 4) of each image, and with targets the losses.

        Args:
            maps: The pyramid (B, C, H, W), finest first.
            sizes: Height and width of each image inside the padded batch.
            targets: `boxes` (m, 4) of each image.
        """
        scored = self.score(list(maps))
        boxes, _ = self.propose(scored, sizes)
        return boxes, {} if targets is None else self.losses(scored, sizes, targets)

    def score(self, maps: list[Tensor]) -> Scored:
        """Run the head on every level."""
        objectness, deltas = self.head(maps)
        anchors = self.anchor_generator(maps)
        logits, deltas = concat_box_prediction_layers(objectness, deltas)
        logits = logits.float().view(len(maps[0]), -1)
        return Scored(logits, deltas.float(), torch.cat(anchors), [len(level) for level in anchors])

    @torch.no_grad()
    def propose(self, scored: Scored, sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """The best boxes (n, 4) of each image and their scores (n,)."""
        boxes = self.box_coder.decode(scored.deltas, [scored.anchors] * len(sizes)).view(len(sizes), -1, 4)
        return self.filter_proposals(boxes, scored.objectness, list(sizes), scored.per_level)

    def losses(
        self, scored: Scored, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Cross-entropy and box loss, both summed over the drawn anchors of the batch and divided by their number."""
        owners = [self._assign(scored.anchors, size, t["boxes"]) for size, t in zip(sizes, targets, strict=True)]
        drawn = self.fg_bg_sampler([torch.where(o == IGNORED, -1, (o >= 0).long()) for o in owners])
        positive, negative = (torch.stack(masks).bool() for masks in drawn)
        chosen = positive | negative
        count = chosen.sum().clamp(min=1)
        wanted = positive[chosen].float()
        objectness = F.binary_cross_entropy_with_logits(scored.objectness[chosen], wanted, reduction="sum") / count
        goals = [self._goals(scored.anchors, *each) for each in zip(owners, positive, targets, strict=True)]
        deltas = scored.deltas.view(len(sizes), -1, 4)[positive]
        box = F.smooth_l1_loss(deltas, torch.cat(goals), beta=self.box_beta, reduction="sum") / count
        return {"loss_rpn_objectness": objectness, "loss_rpn_box": box}

    def _assign(self, anchors: Tensor, size: tuple[int, int], objects: Tensor) -> Tensor:
        """Object of each anchor, `NEGATIVE` or `IGNORED`; anchors far outside the image are ignored."""
        if self.allowed_border is None:
            return self.proposal_matcher.assign(objects, anchors)
        limit = anchors.new_tensor([size[1], size[0]]) + self.allowed_border
        inside = ((anchors[:, :2] >= -self.allowed_border) & (anchors[:, 2:] < limit)).all(dim=1)
        owner = torch.full((len(anchors),), IGNORED, device=anchors.device)
        owner[inside] = self.proposal_matcher.assign(objects, anchors[inside])
        return owner

    def _goals(self, anchors: Tensor, owner: Tensor, positive: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Deltas (n, 4) from the positive anchors to their objects."""
        return self.box_coder.encode_single(target["boxes"][owner[positive]], anchors[positive])
