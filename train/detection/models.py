"""The detectors: Faster R-CNN, Mask R-CNN, Cascade Mask R-CNN and RetinaNet, registered with mmengine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

import vizoo

from . import layouts
from .boxes import Detections
from .cascade import CascadeBoxBranch
from .detector import Detector
from .proposals import ProposalNetwork
from .retinanet import DenseBranch
from .roi_heads import BoxBranch, MaskBranch

Found = tuple[list[Detections], list[Tensor] | None]
Options = Mapping[str, Any] | None
Sizes = list[tuple[int, int]]


class TwoStage(Detector):
    """Proposals, and what a subclass makes of them in `second_losses` and `second_detections`.

    Args:
        backbone: See `Detector`.
        rpn: Arguments of `ProposalNetwork`.
        options: Further arguments of `Detector`.
    """

    mask: MaskBranch

    def __init__(
        self, backbone: Mapping[str, Any] | vizoo.Backbone, rpn: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        super().__init__(backbone, **options)
        self.rpn = ProposalNetwork(self.neck.channels, self.neck.strides, **rpn)

    @property
    def pooled_from(self) -> tuple[int, tuple[int, ...], int]:
        """Channels and strides of the levels that boxes are pooled from, and classes: first arguments of a branch."""
        return self.neck.channels, self.neck.strides[:-1], self.num_classes

    def second_losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Losses by name on the proposals (n, 4) of each image."""
        raise NotImplementedError(f"{type(self).__name__} must implement second_losses()")

    def second_detections(self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> Found:
        """Detections among the proposals (n, 4) of each image, and their masks."""
        raise NotImplementedError(f"{type(self).__name__} must implement second_detections()")

    def head_losses(self, maps: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`loss_rpn_objectness`, `loss_rpn_box`, and those of the second stage."""
        proposals, losses = self.rpn(maps, sizes, targets)
        return {**losses, **self.second_losses(_pooled(maps), proposals, sizes, targets)}

    def head_detections(self, maps: list[Tensor], sizes: Sizes) -> Found:
        """Boxes in input pixels, and their masks."""
        proposals, _ = self.rpn(maps, sizes)
        return self.second_detections(_pooled(maps), proposals, sizes)

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Detector`."""
        return self.mask.paste(masks, boxes, size)


@MODELS.register_module()
class FasterRCNN(TwoStage):
    """Proposals, then a class and a refined box for each.

    Args:
        backbone: See `Detector`.
        rpn: Arguments of `ProposalNetwork` that differ from the official ones.
        box: Arguments of `BoxBranch` that differ from the official ones.
        **options: Further arguments of `Detector`.
    """

    official_keys: tuple[tuple[str, str], ...] = layouts.TWO_STAGE

    def __init__(
        self, backbone: Mapping[str, Any] | vizoo.Backbone, *, rpn: Options = None, box: Options = None, **options: Any
    ) -> None:
        super().__init__(backbone, rpn or {}, options)
        self.box = BoxBranch(*self.pooled_from, **(box or {}))
        if (box or {}).get("convs"):
            self.official_keys = layouts.TWO_STAGE_CONVS

    def second_losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """`loss_classifier`, `loss_box_reg`."""
        return self.box.loss(maps, proposals, targets)[0]

    def second_detections(self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> Found:
        """See `TwoStage`."""
        return self.box.detect(maps, proposals, sizes), None


@MODELS.register_module()
class MaskRCNN(FasterRCNN):
    """Faster R-CNN that also draws the mask of each detection.

    Args:
        backbone: See `Detector`.
        mask: Arguments of `MaskBranch` that differ from the official ones.
        **options: Further arguments of `FasterRCNN`.
    """

    needs_masks = True

    def __init__(self, backbone: Mapping[str, Any] | vizoo.Backbone, *, mask: Options = None, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.mask = MaskBranch(*self.pooled_from, **(mask or {}))

    def second_losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """`loss_classifier`, `loss_box_reg`, `loss_mask`."""
        losses, samples = self.box.loss(maps, proposals, targets)
        return {**losses, **self.mask.loss(maps, samples, targets)}

    def second_detections(self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> Found:
        """See `TwoStage`."""
        found = self.box.detect(maps, proposals, sizes)
        return found, self.mask.detect(maps, found)


@MODELS.register_module()
class CascadeMaskRCNN(TwoStage):
    """Proposals that three box heads refine one after the other, and a mask head per stage.

    Args:
        backbone: See `Detector`.
        rpn: Arguments of `ProposalNetwork` that differ from the official ones: smooth L1 with beta 1/9, 2000 proposals
            in training, anchors inside the image.
        box: Arguments of `CascadeBoxBranch` that differ from the official ones.
        mask: Arguments of `MaskBranch` that differ from the official ones.
        stage_loss_weights: Weight of each stage's losses.
        **options: Further arguments of `Detector`.

    Raises:
        ValueError: Not one loss weight per stage.
    """

    official_keys = layouts.CASCADE
    needs_masks = True

    def __init__(
        self,
        backbone: Mapping[str, Any] | vizoo.Backbone,
        *,
        rpn: Options = None,
        box: Options = None,
        mask: Options = None,
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        **options: Any,
    ) -> None:
        super().__init__(
            backbone, {"box_beta": 1 / 9, "train_kept": 2000, "allowed_border": 0.0, **(rpn or {})}, options
        )
        self.box = CascadeBoxBranch(*self.pooled_from, **(box or {}))
        stages = len(self.box.stages)
        if len(stage_loss_weights) != stages:
            raise ValueError(f"a cascade needs one loss weight per stage, got {len(stage_loss_weights)} for {stages}")
        self.mask = MaskBranch(*self.pooled_from, stages=stages, **(mask or {}))
        self.stage_loss_weights = tuple(stage_loss_weights)

    def second_losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """`stage1_loss_classifier`, `stage1_loss_box_reg`, `stage1_loss_mask`, and the same of further stages."""
        losses: dict[str, Tensor] = {}
        by_stage, drawn = self.box.loss(maps, proposals, targets, sizes)
        for stage, (weight, found, samples) in enumerate(zip(self.stage_loss_weights, by_stage, drawn, strict=True)):
            found = {**found, **self.mask.loss(maps, samples, targets, stage)}
            losses |= {f"stage{stage + 1}_{name}": weight * value for name, value in found.items()}
        return losses

    def second_detections(self, maps: list[Tensor], proposals: list[Tensor], sizes: Sizes) -> Found:
        """See `TwoStage`."""
        found = self.box.detect(maps, proposals, sizes)
        return found, self.mask.detect(maps, found)


@MODELS.register_module()
class RetinaNet(Detector):
    """A single stage: every anchor is classified and refined.

    The official setting reads strides 8, 16 and 32: give the backbone `out_indices=(1, 2, 3)`.

    Args:
        backbone: See `Detector`.
        head: Arguments of `DenseBranch` that differ from the official ones.
        **options: Further arguments of `Detector`.
    """

    official_keys = layouts.RETINANET

    def __init__(self, backbone: Mapping[str, Any] | vizoo.Backbone, *, head: Options = None, **options: Any) -> None:
        super().__init__(backbone, **{"extra_convs": True, **options})
        self.head = DenseBranch(self.neck.channels, self.neck.strides, self.num_classes, **(head or {}))

    def head_losses(self, maps: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`loss_classifier`, `loss_box_reg`."""
        return self.head.loss(maps, targets)

    def head_detections(self, maps: list[Tensor], sizes: Sizes) -> Found:
        """Boxes in input pixels; no masks."""
        return self.head.detect(maps, sizes), None


def _pooled(maps: Sequence[Tensor]) -> list[Tensor]:
    """The levels that boxes and masks are pooled from, in float32 once for both."""
    return [m.float() for m in maps[:-1]]
