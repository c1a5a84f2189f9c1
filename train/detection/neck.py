"""The feature pyramid between a backbone and the heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import vizoo


class ExtraLevels(LastLevelP6P7):
    """Two levels convolved from the backbone's coarsest map, as mmdetection's RetinaNet.

    Args:
        in_channels: Channels of that map.
        out_channels: Channels of the pyramid.
        relu: Rectify the first level in front of the second, as torchvision does.
    """

    def __init__(self, in_channels: int, out_channels: int, *, relu: bool = False) -> None:
        super().__init__(in_channels, out_channels)
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The pyramid's maps and names with two more."""
        # torchvision takes the pyramid's last map instead where both have the same number of channels.
        sixth = self.p6(c[-1])
        seventh = self.p7(F.relu(sixth) if self.relu else sixth)
        return [*p, sixth, seventh], [*names, "p6", "p7"]


class Pyramid(FeaturePyramidNetwork):
    """Feature pyramid over a backbone's maps; torchvision's computes what the official code does.

    Args:
        backbone: The backbone, which says its maps' channels and strides.
        channels: Channels of every level.
        extra_convs: Add two convolved levels (RetinaNet) rather than one that is subsampled (two-stage detectors).

    Raises:
        ValueError: The strides of the backbone's maps do not double from map to map.
    """

    def __init__(self, backbone: vizoo.Backbone, channels: int = 256, *, extra_convs: bool = False) -> None:
        widths, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"a feature pyramid needs maps whose strides double from one to the next, got strides {strides}; "
                "choose another backbone or other out_indices"
            )
        extra: nn.Module = ExtraLevels(widths[-1], channels) if extra_convs else LastLevelMaxPool()
        super().__init__(widths, channels, extra)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.channels = channels
        self.strides = (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(2 if extra_convs else 1)))
        """Input pixels per position of each level."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One (B, channels, H, W) map per level, finest first, from the backbone's maps."""
        return list(super().forward({str(i): m for i, m in enumerate(maps)}).values())
