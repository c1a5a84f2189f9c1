"""The model wrapper that trains a backbone to classify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

import vizoo
from vizoo.checkpoint import LoadReport
from vizoo.weights.record import Weights

MODES = ("loss", "predict", "tensor")


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A backbone with its classifier, as mmengine's Runner drives it.

    Args:
        backbone: Arguments of `vizoo.create_model` (`name`, `pretrained`, `num_classes`, overrides), or a module that
            maps images (B, C, H, W) to logits (B, classes).
        mixup: A callable (inputs, labels) -> (inputs, soft targets (B, classes)) applied to training batches, or the
            config of one; it smooths its targets itself. None trains on the labels.
        label_smoothing: Share of the target spread over all classes where there is no mixup.
        data_preprocessor: How mmengine brings a batch to the model's device; None copies without blocking.

    Attributes:
        further_loss: A callable (inputs, logits) -> loss that training adds to its own, or None. It is given the images
            as they were mixed; hooks set it, such as `vizoo.train.hooks_mesa.Mesa`.

    Raises:
        ValueError: Smoothing outside [0, 1).
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nn.Module,
        *,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor or {"type": "BaseDataPreprocessor", "non_blocking": True})
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.backbone = backbone if isinstance(backbone, nn.Module) else vizoo.create_model(**backbone)
        self.mixup = MODELS.build(mixup) if isinstance(mixup, Mapping) else mixup
        self.label_smoothing = label_smoothing
        self.further_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, inputs: Tensor, label: Tensor | None = None, mode: str = "tensor") -> Any:
        """Run a batch.

        Args:
            inputs: Images (B, C, H, W).
            label: Class of each image (B,); needed for the loss.
            mode: `loss`, `predict` or `tensor`.

        Returns:
            `loss`: a dict with the mean cross-entropy, and with `further_loss` where one is set. `predict`: a list
            that holds one dict for the whole batch, with `logits` (B, classes) and `label`. `tensor`: logits
            (B, classes).

        Raises:
            ValueError: An unknown mode, a loss without labels, or images with other channels than the backbone takes.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._check_images(inputs)
        if mode == "tensor":
            return self.backbone(inputs)
        if mode == "predict":
            return [{"logits": self.backbone(inputs), "label": label}]
        if label is None:
            raise ValueError("mode='loss' needs the labels of the batch, got label=None")
        return self.losses(inputs, label)

    def load_checkpoint(self, source: str | Path | Weights | Mapping[str, Tensor]) -> LoadReport:
        """Load backbone and classifier; see `vizoo.load_checkpoint`.

        Raises:
            TypeError: The backbone is none of the zoo's.
        """
        if not isinstance(self.backbone, vizoo.Backbone):
            raise TypeError(f"checkpoints are read into a vizoo.Backbone, got {type(self.backbone).__name__}")
        return vizoo.load_checkpoint(self.backbone, source)

    def losses(self, inputs: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy of a batch, against mixed targets where `mixup` is set and the model is training."""
        target, smoothing = label, self.label_smoothing
        if self.mixup is not None and self.training:
            with torch.no_grad():
                inputs, target = self.mixup(inputs, label)
            smoothing = 0.0
        logits = self.backbone(inputs)
        found = {"loss": F.cross_entropy(logits, target, label_smoothing=smoothing)}
        if self.further_loss is None or not self.training:
            return found
        # mmengine adds up all of them, and calls the sum `loss`.
        return {"label_loss": found["loss"], "further_loss": self.further_loss(inputs, logits)}

    def _check_images(self, inputs: Tensor) -> None:
        expected = getattr(self.backbone, "in_chans", None)
        if inputs.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), got shape {tuple(inputs.shape)}")
        if expected is not None and inputs.shape[1] != expected:
            raise ValueError(
                f"the backbone takes {expected} channels, the images have {inputs.shape[1]}: "
                f"set model.backbone.in_chans={inputs.shape[1]} or convert the images"
            )
