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


@MODELS.register_module()
class FasterRCNN(Detector):
    """Proposals, then a class and a refined box for each.

    Args:
        backbone: See `Detector`.
        rpn: Arguments of `ProposalNetwork` that differ from the official ones.
        box: Arguments of `BoxBranch` that differ from the official ones.
        **options: Further arguments of `Detector`.
    """

    official_keys = layouts.TWO_STAGE

    def __init__(
        self, backbone: Mapping[str, Any] | vizoo.Backbone, *, rpn: Options = None, box: Options = None, **options: Any
    ) -> None:
        super().__init__(backbone, **options)
        channels, strides = self.neck.channels, self.neck.strides
        self.rpn = ProposalNetwork(channels, strides, **(rpn or {}))
        self.box = BoxBranch(channels, strides[:-1], self.num_classes, **(box or {}))

    def head_losses(self, maps: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`loss_rpn_objectness`, `loss_rpn_box`, `loss_classifier`, `loss_box_reg`."""
        proposals, losses = self.rpn(maps, sizes, targets)
        box_losses, _ = self.box.loss(maps, proposals, targets)
        return {**losses, **box_losses}

    def head_detections(self, maps: list[Tensor], sizes: Sizes) -> Found:
        """Boxes in input pixels; no masks."""
        proposals, _ = self.rpn(maps, sizes)
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
        self.mask = MaskBranch(self.neck.channels, self.neck.strides[:-1], self.num_classes, **(mask or {}))

    def head_losses(self, maps: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Those of `FasterRCNN`, and `loss_mask`."""
        proposals, losses = self.rpn(maps, sizes, targets)
        maps = pooled_maps(maps)
        box_losses, samples = self.box.loss(maps, proposals, targets)
        return {**losses, **box_losses, **self.mask.loss(maps, samples, targets)}

    def head_detections(self, maps: list[Tensor], sizes: Sizes) -> Found:
        """Boxes in input pixels, and their masks."""
        proposals, _ = self.rpn(maps, sizes)
        maps = pooled_maps(maps)
        found = self.box.detect(maps, proposals, sizes)
        return found, self.mask.detect(maps, found)

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Detector`."""
        return self.mask.paste(masks, boxes, size)


@MODELS.register_module()
class CascadeMaskRCNN(Detector):
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
        super().__init__(backbone, **options)
        channels, strides = self.neck.channels, self.neck.strides
        official = {"box_beta": 1 / 9, "train_kept": 2000, "allowed_border": 0.0}
        self.rpn = ProposalNetwork(channels, strides, **{**official, **(rpn or {})})
        self.box = CascadeBoxBranch(channels, strides[:-1], self.num_classes, **(box or {}))
        stages = len(self.box.stages)
        if len(stage_loss_weights) != stages:
            raise ValueError(f"a cascade needs one loss weight per stage, got {len(stage_loss_weights)} for {stages}")
        self.mask = MaskBranch(channels, strides[:-1], self.num_classes, **{"stages": stages, **(mask or {})})
        self.stage_loss_weights = tuple(stage_loss_weights)

    def head_losses(self, maps: list[Tensor], sizes: Sizes, targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`loss_rpn_objectness`, `loss_rpn_box`, and per stage `stage1_loss_classifier`, `_box_reg`, `_mask`."""
        proposals, losses = self.rpn(maps, sizes, targets)
        maps = pooled_maps(maps)
        by_stage, drawn = self.box.loss(maps, proposals, targets, sizes)
        for stage, (weight, found, samples) in enumerate(zip(self.stage_loss_weights, by_stage, drawn, strict=True)):
            found = {**found, **self.mask.loss(maps, samples, targets, stage)}
            losses |= {f"stage{stage + 1}_{name}": weight * value for name, value in found.items()}
        return losses

    def head_detections(self, maps: list[Tensor], sizes: Sizes) -> Found:
        """Boxes in input pixels, and their masks."""
        proposals, _ = self.rpn(maps, sizes)
        maps = pooled_maps(maps)
        found = self.box.detect(maps, proposals, sizes)
        return found, self.mask.detect(maps, found)

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Detector`."""
        return self.mask.paste(masks, boxes, size)


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


def pooled_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """The levels that boxes and masks are pooled from, in float32 once for both."""
    return [m.float() for m in maps[:-1]]
