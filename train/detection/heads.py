"""The networks of the second stage: what is computed from the pooled features of a box.

The order of classes is the official one everywhere in this package: objects from 0 on, background last. torchvision
puts background first; with the official order a checkpoint only has to be renamed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from .norms import norm_layer


class BoxHead(nn.Module):
    """Classifies and refines boxes.

    Args:
        channels: Channels of the pooled features.
        num_classes: Classes of objects.
        size: Side of the pooled features.
        convs: Channels of 3 x 3 convolutions with a norm in front, as the cascade has them.
        hidden: Widths of the linear layers behind them.
        norm: That norm: `batch`, which on several GPUs mmengine's `sync_bn="torch"` makes synchronous, or `layer`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        size: int = 7,
        convs: Sequence[int] = (),
        hidden: Sequence[int] = (1024, 1024),
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.features = FastRCNNConvFCHead((channels, size, size), list(convs), list(hidden), norm_layer(norm))
        self.cls_score = nn.Linear(hidden[-1], num_classes + 1)
        self.bbox_pred = nn.Linear(hidden[-1], num_classes * 4)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, num_classes + 1) and deltas (n, num_classes * 4), float32, of features (n, C, size, size)."""
        hidden = self.features(pooled)
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float()


class MaskHead(nn.Module):
    """Draws the mask of a box, one map per class.

    Args:
        channels: Channels of the pooled features.
        num_classes: Classes of objects.
        hidden: Channels of the 3 x 3 convolutions; the last is also the width of the enlarged map.
        norm: A norm behind these, `batch` or `layer`; None has none.
    """

    def __init__(
        self, channels: int, num_classes: int, *, hidden: Sequence[int] = (256,) * 4, norm: str | None = None
    ) -> None:
        super().__init__()
        self.features = MaskRCNNHeads(channels, list(hidden), 1, None if norm is None else norm_layer(norm))
        self.predictor = MaskRCNNPredictor(hidden[-1], hidden[-1], num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (n, num_classes, 2 S, 2 S), float32, of features (n, C, S, S)."""
        return self.predictor(self.features(pooled)).float()
