"""What `vizoo.as_torchvision_backbone` builds. Importing this module imports torchvision."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vizoo.backbones.base import Backbone


class TorchvisionBackbone(nn.Module):
    """A backbone and a feature pyramid on its maps.

    Args:
        body: A backbone made with `features_only`.
        fpn_channels: Channels of every map of the pyramid.
        extra_blocks: What adds coarser maps; None takes `LastLevelMaxPool`.

    Raises:
        ValueError: `fpn_channels` is below 1.
    """

    def __init__(self, body: Backbone, fpn_channels: int = 256, extra_blocks: nn.Module | None = None) -> None:
        super().__init__()
        if fpn_channels < 1:
            raise ValueError(f"fpn_channels must be 1 or more, got {fpn_channels}")
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), fpn_channels, LastLevelMaxPool() if extra_blocks is None else extra_blocks
        )
        self.out_channels = fpn_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, in_chans, H, W) to maps (B, out_channels, h, w) by name, finest first."""
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
