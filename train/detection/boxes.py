"""Boxes: deltas between them, which object each belongs to, and what is left of overlapping ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils
from torchvision.ops import batched_nms, box_iou

NEGATIVE, IGNORED = -1, -2
"""What an `Assigner` gives to a box that belongs to no object, and to one that is left out of the loss."""


class Detections(NamedTuple):
    """Boxes (n, 4) of one image, their scores (n,) and labels (n,), best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class BoxCoder(torchvision_utils.BoxCoder):
    """Deltas (dx, dy, dw, dh) between boxes, as mmdetection.

    Args:
        weights: What deltas are multiplied with; 1 / standard deviation in mmdetection's terms.
        clip: Largest |dw| and |dh| that is decoded.
        clip_both_sides: Also limit shrinking; torchvision limits only growth.
    """

    def __init__(
        self,
        weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        clip: float = math.log(1000 / 16),
        *,
        clip_both_sides: bool = True,
    ) -> None:
        super().__init__(weights, clip)
        self.clip_both_sides = clip_both_sides

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (n, 4 k) from deltas (n, 4 k) to boxes (n, 4)."""
        if self.clip_both_sides:
            shift, width, height = rel_codes.unflatten(1, (-1, 4)).split((2, 1, 1), dim=2)
            width = width.clamp(min=-self.bbox_xform_clip * self.weights[2])
            height = height.clamp(min=-self.bbox_xform_clip * self.weights[3])
            rel_codes = torch.cat([shift, width, height], dim=2).flatten(1)
        return super().decode_single(rel_codes, boxes)


class Assigner(torchvision_utils.Matcher):
    """Which object each of many boxes belongs to, as mmdetection's MaxIoUAssigner.

    A box belongs to the object that it overlaps most, from `positive` on; it is negative below `negative`. With the
    low-quality rule each object also takes all boxes that tie for its best overlap, if that is at least
    `low_quality_min`, and **those boxes become its own**; in torchvision they keep the object that they overlap most.

    Args:
        positive: Least IoU of a positive box.
        negative: IoU below which a box is negative.
        low_quality_min: Least best overlap for the low-quality rule; None turns the rule off.

    Raises:
        ValueError: `negative` exceeds `positive`.
    """

    def __init__(self, positive: float, negative: float, low_quality_min: float | None = None) -> None:
        if negative > positive:
            raise ValueError(f"the negative IoU must not exceed the positive one, got {negative} and {positive}")
        super().__init__(positive, negative, allow_low_quality_matches=low_quality_min is not None)
        self.low_quality_min = low_quality_min

    def assign(self, objects: Tensor, boxes: Tensor) -> Tensor:
        """Index of the object of each box (n,), or `NEGATIVE` or `IGNORED`; objects (m, 4), boxes (n, 4)."""
        if len(objects) == 0 or len(boxes) == 0:
            return torch.full((len(boxes),), NEGATIVE, device=boxes.device)
        return self(box_iou(objects, boxes))

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Give to each object its best boxes; where two objects claim one, the later object has it."""
        assert self.low_quality_min is not None
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        # An object that overlaps no box at all ties with every box; mmdetection then gives it all of them.
        claims = (match_quality_matrix == best) & (best >= self.low_quality_min) & (best > 0)
        order = torch.arange(len(best), device=best.device)[:, None]
        owner = torch.where(claims, order, -1).amax(dim=0)
        matches.copy_(torch.where(owner >= 0, owner, matches))


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms: float, limit: int) -> Detections:
    """The best boxes of an image, without those that overlap a better one of their class.

    Args:
        boxes: Candidates (n, 4).
        scores: Their scores (n,).
        labels: Their classes (n,).
        nms: Largest IoU of two boxes of one class.
        limit: Most boxes kept.
    """
    keep = batched_nms(boxes, scores, labels, nms)[:limit]
    return Detections(boxes[keep], scores[keep], labels[keep])


def not_empty(boxes: Tensor) -> Tensor:
    """Which boxes (n, 4) have a positive width and height; (n,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def rescale(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) in an image of `size` (height, width) brought to the original image by each axis's true factor."""
    factors = boxes.new_tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)
    return boxes / factors
