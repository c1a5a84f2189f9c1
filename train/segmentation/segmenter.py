"""The model wrapper that trains a backbone to segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

import vizoo
from vizoo.checkpoint import LoadReport
from vizoo.dense import freeze
from vizoo.train.dense import MEAN, STD, ImageBatcher, build_backbone, pad_to
from vizoo.train.dense_checkpoint import Source

from .inference import Inference, MultiScale, Whole, build_inference
from .layers import resize

MODES = ("loss", "predict", "tensor")

Part = nn.Module | Mapping[str, Any]
Mode = Inference | MultiScale


@MODELS.register_module()
class Segmenter(BaseModel):
    """A backbone with a decode head, as mmengine's Runner drives it.

    Heads and neck are modules, or configs whose `type` is their class; `in_channels` and `num_classes` are filled in.

    Args:
        backbone: Arguments of `vizoo.create_model` without `features_only`, or a model built with it. Families that
            have output norms get them.
        decode_head: Maps to logits, such as `UPerHead`.
        auxiliary_head: A second head that only training runs, such as `FCNHead`.
        neck: Between backbone and heads: maps to maps, with `out_channels`, such as `FPN`.
        num_classes: Classes of the labels.
        auxiliary_weight: Weight of the auxiliary head's loss.
        ignore_index: Label of pixels that are not learnt.
        ignore_in_mean: Count ignored pixels as zeros in the mean of the loss, as published; otherwise the mean is over
            labelled pixels.
        inference: How images are read at test time: `Whole()`, `Sliding(...)`, `MultiScale(...)`, or a config of one.
        pad_size: Height and width that batches are padded to at least in training; None pads to the largest image.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        grad_checkpointing: Recompute the backbone's blocks in the backward pass.
        mean: Mean of the images' channels, on 0..255.
        std: Standard deviation of the images' channels, on 0..255.
        data_preprocessor: How mmengine brings a batch to the model's device; None copies without blocking.

    Raises:
        ValueError: A head for other classes, or frozen stages that are not there.
        TypeError: A head that is neither module nor config.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | vizoo.Backbone,
        decode_head: Part,
        auxiliary_head: Part | None = None,
        neck: Part | None = None,
        *,
        num_classes: int,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        ignore_in_mean: bool = True,
        inference: Mode | Mapping[str, Any] | None = None,
        pad_size: tuple[int, int] | None = None,
        frozen_stages: int = -1,
        grad_checkpointing: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor or {"type": "BaseDataPreprocessor", "non_blocking": True})
        self.backbone = build_backbone(backbone)
        widths: Sequence[int] = self.backbone.feature_info.channels()
        self.neck = None if neck is None else build_part("neck", neck, in_channels=widths)
        widths = widths if self.neck is None else cast(Sequence[int], self.neck.out_channels)
        self.decode_head = build_head("decode_head", decode_head, widths, num_classes)
        self.auxiliary_head = (
            None if auxiliary_head is None else build_head("auxiliary_head", auxiliary_head, widths, num_classes)
        )
        # Maps lie in memory with their channels together; weights that lie so are not copied in every step.
        for part in filter(None, (self.neck, self.decode_head, self.auxiliary_head)):
            part.to(memory_format=torch.channels_last)
        self.num_classes = num_classes
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index, self.ignore_in_mean = ignore_index, ignore_in_mean
        self.inference: Mode = build_inference(inference or Whole())
        self.pad_size = pad_size or (0, 0)
        self.batcher = ImageBatcher(mean, std)
        self.backbone.set_grad_checkpointing(grad_checkpointing)
        self._frozen = freeze(self.backbone, frozen_stages)

    def train(self, mode: bool = True) -> Segmenter:
        """Switch to training or evaluation; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None = None, mode: str = "tensor"
    ) -> Any:
        """Run a batch.

        Args:
            images: uint8 RGB images (3, H, W) of any sizes.
            targets: A dict per image: `map` (H, W) of class indices, at the image's size for the loss; for predictions
                `original_size` (H, W) and `path`, all optional.
            mode: `loss`, `predict` or `tensor`.

        Returns:
            `loss`: a dict of losses, and the pixel accuracy `acc_seg` in percent. `predict`: a dict per image with
            `label_map` (H, W) int64 at the original size, `target` and `path`. `tensor`: the decode head's logits
            (B, num_classes, h, w).

        Raises:
            ValueError: An unknown mode, images that are not such, or a loss without maps that fit.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        check_images(images)
        if mode == "tensor":
            return self.logits(self.batcher(images))
        if mode == "predict":
            return self.predict(images, targets or [{}] * len(images))
        if targets is None:
            raise ValueError("mode='loss' needs the label maps of the batch, got targets=None")
        return self.loss(images, targets)

    def load_checkpoint(self, source: Source) -> LoadReport:
        """Load a whole segmenter, published or our own; see `.convert.load_segmenter_checkpoint`."""
        from .convert import load_segmenter_checkpoint  # which builds on this class

        return load_segmenter_checkpoint(self, source)

    def maps(self, x: Tensor) -> list[Tensor]:
        """What the heads read, of normalised images (B, 3, H, W)."""
        found = self.backbone(x)
        return found if self.neck is None else self.neck(found)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, h, w) of normalised images (B, 3, H, W), at the decode head's stride."""
        return self.decode_head(self.maps(x))

    def loss(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`loss_decode`, `loss_aux` where there is such a head, and `acc_seg`."""
        x = self.batcher(images, self.pad_size)
        label = self._labels(images, targets, (x.shape[2], x.shape[3]))
        maps = self.maps(x)
        logits = resize(self.decode_head(maps).float(), label.shape[1:])
        found = {"loss_decode": self._cross_entropy(logits, label)}
        if self.auxiliary_head is not None:
            auxiliary = resize(self.auxiliary_head(maps).float(), label.shape[1:])
            found["loss_aux"] = self.auxiliary_weight * self._cross_entropy(auxiliary, label)
        return found | {"acc_seg": self._accuracy(logits.detach(), label)}

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A label map per image; images of one size are read together."""
        sizes = [tuple(t.get("original_size", i.shape[1:])) for i, t in zip(images, targets, strict=True)]
        if len({(tuple(i.shape), size) for i, size in zip(images, sizes, strict=True)}) == 1:
            label_maps = list(self._label_maps(images, sizes[0]))
        else:
            label_maps = [self._label_maps([i], size)[0] for i, size in zip(images, sizes, strict=True)]
        return [
            {"label_map": found, "target": target.get("map"), "path": target.get("path")}
            for found, target in zip(label_maps, targets, strict=True)
        ]

    def _label_maps(self, images: Sequence[Tensor], size: tuple[int, ...]) -> Tensor:
        return self.inference(self.logits, self.batcher(images), (size[0], size[1])).argmax(1)

    def _labels(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], sides: tuple[int, int]) -> Tensor:
        """Label maps (B, height, width) int64; what pads the images is ignored."""
        for image, target in zip(images, targets, strict=True):
            if target["map"].shape != image.shape[1:]:
                raise ValueError(
                    "a label map must have the height and width of its image in training, "
                    f"got {tuple(target['map'].shape)} for an image {tuple(image.shape)}"
                )
        return torch.stack([pad_to(t["map"].long(), *sides, value=self.ignore_index) for t in targets])

    def _cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        total = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="sum")
        if self.ignore_in_mean:
            return total / label.numel()
        return total / (label != self.ignore_index).sum().clamp(min=1)

    def _accuracy(self, logits: Tensor, label: Tensor) -> Tensor:
        labelled = label != self.ignore_index
        right = (logits.argmax(1) == label) & labelled
        return 100.0 * right.sum() / labelled.sum().clamp(min=1)


def build_part(name: str, part: Part, **options: Any) -> nn.Module:
    """A module as it is, or from its config with `options` filled in.

    Raises:
        TypeError: Neither of the two.
    """
    if isinstance(part, nn.Module):
        return part
    if not isinstance(part, Mapping):
        raise TypeError(f"{name} must be a module or a config with its class as type, got {type(part).__name__}")
    return MODELS.build({**options, **part})


def build_head(name: str, head: Part, in_channels: Sequence[int], num_classes: int) -> nn.Module:
    """A head for maps of these channels and labels of these classes.

    Raises:
        ValueError: A head for other classes.
    """
    built = build_part(name, head, in_channels=in_channels, num_classes=num_classes)
    classes = getattr(built, "num_classes", num_classes)
    if classes != num_classes:
        raise ValueError(f"{name} has {classes} classes, the segmenter {num_classes}: give both the same num_classes")
    return built


def check_images(images: Sequence[Tensor]) -> None:
    """Raise unless these are images of bytes.

    Raises:
        ValueError: No image, or one of another type or shape.
    """
    if not len(images):
        raise ValueError("a batch needs at least one image, got none")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
