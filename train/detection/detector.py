"""What all detectors share: batches in, losses or detections at the images' original sizes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor

import vizoo
from vizoo.checkpoint import LoadReport
from vizoo.dense import batch_norms, freeze
from vizoo.train.dense import MEAN, STD, ImageBatcher, build_backbone
from vizoo.train.dense_checkpoint import Source

from .boxes import Detections, not_empty, rescale
from .neck import Pyramid

MODES = ("loss", "predict", "tensor")
MULTIPLE = 32


class Detector(BaseModel):
    """A backbone, a feature pyramid and what a subclass puts on it, as mmengine's Runner drives it.

    Subclasses implement `head_losses` and `head_detections`, and `paste` where they have masks.

    Args:
        backbone: Arguments of `vizoo.create_model` without `features_only`, or a backbone built with it.
        num_classes: Classes of objects; labels run from 0, and background is no class.
        channels: Channels of the pyramid.
        extra_convs: See `Pyramid`.
        neck: Config of a pyramid, with its class as `type` and what differs: `Pyramid` (None), or `SimplePyramid` for
            plain backbones.
        adapter: Config of an adapter that makes the pyramid's maps beside a plain backbone, such as `VitAdapter`.
        pad_size: Height and width that batches are padded to at least; None pads to the largest image.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages; what is frozen
            stays in eval mode.
        norm_eval: Keep the backbone's batch norms in eval mode, as published detectors do: batches are small, and
            padded. Their factors and biases learn.
        grad_checkpointing: Recompute the backbone's blocks in the backward pass, to save memory.
        mean: Mean of each channel on 0..255, in the order of the images (RGB).
        std: Standard deviation of each channel on 0..255.
        data_preprocessor: How mmengine brings a batch to the model's device; None copies without blocking.

    Raises:
        ValueError: No class, or a backbone that cannot carry a pyramid.
    """

    official_keys: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) from the official checkpoint's names of the neck and heads to ours."""
    needs_masks: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Mapping[str, Any] | vizoo.Backbone,
        *,
        num_classes: int = 80,
        channels: int = 256,
        extra_convs: bool = False,
        neck: Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
        pad_size: tuple[int, int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = True,
        grad_checkpointing: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        data_preprocessor: dict[str, Any] | torch.nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor or {"type": "BaseDataPreprocessor", "non_blocking": True})
        if num_classes < 1:
            raise ValueError(f"num_classes counts the classes of objects and must be 1 or more, got {num_classes}")
        self.num_classes = num_classes
        self.backbone = build_backbone(backbone)
        self.backbone.set_grad_checkpointing(grad_checkpointing)
        self.adapter = None if adapter is None else MODELS.build({**adapter, "backbone": self.backbone})
        pyramid = {"backbone": self.adapter or self.backbone, "channels": channels, "extra_convs": extra_convs}
        self.neck = MODELS.build({"type": Pyramid, **(neck or {}), **pyramid})
        self.pad_size = pad_size or (0, 0)
        self.batcher = ImageBatcher(mean, std, MULTIPLE)
        self.frozen_stages = frozen_stages
        self._frozen = tuple(freeze(self.backbone, frozen_stages))
        self.norm_eval = norm_eval

    # What a subclass implements.

    def head_losses(
        self, maps: list[Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Losses by name on the pyramid's maps; `sizes` are the images' own inside the padded batch."""
        raise NotImplementedError(f"{type(self).__name__} must implement head_losses()")

    def head_detections(
        self, maps: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Detections], list[Tensor] | None]:
        """Detections of each image in input pixels, and the maps (n, S, S) of their masks, or None without masks."""
        raise NotImplementedError(f"{type(self).__name__} must implement head_detections()")

    def paste(self, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks (n, S, S) of boxes as pixels (n, height, width) of the original image."""
        raise NotImplementedError(f"{type(self).__name__} has masks and must implement paste()")

    # What follows from it.

    def train(self, mode: bool = True) -> Detector:
        """Set training mode, except for what is frozen and, with `norm_eval`, for the backbone's batch norms."""
        super().train(mode)
        for module in (*self._frozen, *(batch_norms(self.backbone) if self.norm_eval else ())):
            module.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None, mode: str = "tensor") -> Any:
        """Run a batch.

        Args:
            images: Images (3, H, W) of bytes, RGB, of any sizes.
            targets: One dict per image. For the loss: `boxes` (n, 4) in the image's pixels, `labels` (n,) and, with a
                mask branch, `masks` (n, H, W). For predictions: `original_size` (height, width) and `image_id`.
            mode: `loss`, `predict` or `tensor`.

        Returns:
            `loss`: losses by name. `predict`: one dict per image with `boxes` (n, 4) in the original image's pixels,
            `scores` (n,), `labels` (n,), `masks` (n, height, width) bool where the model has them, `image_id` and
            `original_size`. `tensor`: the pyramid's maps, finest first.

        Raises:
            ValueError: An unknown mode, images that are none, or targets that are missing or do not fit.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        _check_images(images)
        batch, sizes = self.batcher(images, self.pad_size), [(image.shape[1], image.shape[2]) for image in images]
        if mode == "tensor":
            return self.pyramid(batch)
        if mode == "loss":
            return self.head_losses(self.pyramid(batch), sizes, self._checked(images, targets))
        targets = targets or [{} for _ in images]
        originals = [tuple(target.get("original_size", size)) for target, size in zip(targets, sizes, strict=True)]
        found = self.detect(batch, sizes, originals)
        for prediction, target in zip(found, targets, strict=True):
            prediction["image_id"] = target.get("image_id")
        return found

    def load_checkpoint(self, source: Source) -> LoadReport:
        """Load a whole detector, official or our own; see `vizoo.train.detection.load_detector_checkpoint`."""
        from .convert import load_detector_checkpoint  # which builds on this class

        return load_detector_checkpoint(self, source)

    def pyramid(self, batch: Tensor) -> list[Tensor]:
        """The pyramid's maps of a normalised, padded batch (B, 3, H, W), finest first."""
        maps = self.backbone(batch) if self.adapter is None else self.adapter(self.backbone, batch)
        return self.neck(maps)

    def detect(
        self, batch: Tensor, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Detections of a normalised, padded batch.

        Args:
            batch: Images (B, 3, H, W); sides are multiples of 32.
            sizes: Height and width of each image inside the batch.
            original_sizes: Height and width of each image's file.

        Returns:
            What `forward` returns for `predict`, without `image_id`.
        """
        found, masks = self.head_detections(self.pyramid(batch), list(sizes))
        predictions: list[dict[str, Any]] = []
        for index, (detections, size, original) in enumerate(zip(found, sizes, original_sizes, strict=True)):
            boxes = rescale(detections.boxes, size, original)
            prediction = {**detections._asdict(), "boxes": boxes, "original_size": original}
            if masks is not None:
                prediction["masks"] = self.paste(masks[index], boxes, original)
            predictions.append(prediction)
        return predictions

    def _checked(self, images: list[Tensor], targets: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        """Targets that can be trained on: what has no extent is left out."""
        if targets is None or len(targets) != len(images):
            got = "none" if targets is None else len(targets)
            raise ValueError(f"mode='loss' needs one target per image, got {got} for {len(images)} images")
        pairs = zip(images, targets, strict=True)
        return [self._usable(image, target, index) for index, (image, target) in enumerate(pairs)]

    def _usable(self, image: Tensor, target: dict[str, Any], index: int) -> dict[str, Any]:
        boxes, labels = target["boxes"].float().reshape(-1, 4), target["labels"]
        if len(boxes) != len(labels):
            raise ValueError(f"target {index} has {len(boxes)} boxes but {len(labels)} labels")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1} (background is no class), target {index} has "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        keep = not_empty(boxes) & boxes.isfinite().all(dim=1)
        usable = {**target, "boxes": boxes[keep], "labels": labels[keep]}
        if self.needs_masks:
            usable["masks"] = _masks_of(target, image, index)[keep]
        return usable


def _masks_of(target: dict[str, Any], image: Tensor, index: int) -> Tensor:
    masks = target.get("masks")
    expected = (len(target["boxes"]), *image.shape[1:])
    if masks is None or tuple(masks.shape) != expected:
        got = "no masks" if masks is None else f"masks {tuple(masks.shape)}"
        raise ValueError(
            f"a mask branch needs masks {expected}, one per box and as large as the image; target {index} has {got}"
        )
    return masks


def _check_images(images: Sequence[Tensor]) -> None:
    if not isinstance(images, (list, tuple)) or not images:
        raise ValueError(f"images must be a list of at least one tensor (3, H, W), got {type(images).__name__}")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 tensors (3, H, W), RGB; got {image.dtype} {tuple(image.shape)}")
