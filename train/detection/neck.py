"""The pyramids between a backbone, or an adapter beside it, and the heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import vizoo

from .adapter import VitAdapter
from .norms import ChannelNorm


class ExtraLevels(LastLevelP6P7):
    """Two levels convolved from the backbone's coarsest map, as mmdetection's RetinaNet.

    Args:
        in_channels: Channels of that map.
        out_channels: Channels of the pyramid.
        relu: Rectify the first level in front of the second, as torchvision does.
        norm: Batch norms behind the convolutions.
        on_output: Convolve the pyramid's coarsest map instead, which has `in_channels`, too.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, relu: bool = False, norm: bool = False, on_output: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.relu, self.on_output = relu, on_output
        for name in ("p6", "p7"):
            if norm:
                self.get_submodule(name).register_parameter("bias", None)
            self.add_module(f"{name}_norm", nn.BatchNorm2d(out_channels) if norm else nn.Identity())

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The pyramid's maps and names with two more."""
        # torchvision takes the pyramid's last map instead where both have the same number of channels.
        sixth = self.p6_norm(self.p6(p[-1] if self.on_output else c[-1]))
        seventh = self.p7_norm(self.p7(F.relu(sixth) if self.relu else sixth))
        return [*p, sixth, seventh], [*names, "p6", "p7"]


@MODELS.register_module()
class Pyramid(FeaturePyramidNetwork):
    """Feature pyramid over a backbone's maps; torchvision's computes what the official code does.

    Args:
        backbone: The backbone, or an adapter, which says its maps' channels and strides.
        channels: Channels of every level.
        extra_convs: Add two convolved levels (RetinaNet) rather than one that is subsampled (two-stage detectors).
        norm: Batch norms behind all convolutions.
        extra_on_output: Convolve the two levels from the pyramid's coarsest map, not from the backbone's.

    Raises:
        ValueError: The strides of the backbone's maps do not double from map to map.
    """

    def __init__(
        self,
        backbone: vizoo.Backbone | VitAdapter,
        channels: int = 256,
        *,
        extra_convs: bool = False,
        norm: bool = False,
        extra_on_output: bool = False,
    ) -> None:
        widths, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"a feature pyramid needs maps whose strides double from one to the next, got strides {strides}; "
                "choose another backbone or other out_indices, or for a plain backbone a SimplePyramid or VitAdapter"
            )
        extra: nn.Module = LastLevelMaxPool()
        if extra_convs:
            source = channels if extra_on_output else widths[-1]
            extra = ExtraLevels(source, channels, norm=norm, on_output=extra_on_output)
        super().__init__(widths, channels, extra, nn.BatchNorm2d if norm else None)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.channels = channels
        self.strides = _all_strides(strides, extra_convs)
        """Input pixels per position of each level."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One (B, channels, H, W) map per level, finest first, from the backbone's maps."""
        return list(super().forward({str(i): m for i, m in enumerate(maps)}).values())


def _all_strides(strides: Sequence[int], extra_convs: bool) -> tuple[int, ...]:
    """Those of a pyramid's maps, and of the levels that are added to them."""
    return (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(2 if extra_convs else 1)))


class ConvNorm(nn.Conv2d):
    """A convolution that keeps the map's size, and a layer norm of its channels."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        return self.norm(super().forward(x))


@MODELS.register_module()
class SimplePyramid(nn.Module):
    """A pyramid from the last map of a plain backbone alone.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, arXiv 2203.16527; Vim's
    detectors have it. Parameters are named as in detectron2.

    Args:
        backbone: The backbone, which says its maps' channels and strides.
        channels: Channels of every level.
        extra_convs: Add two convolved levels rather than one that is subsampled.
        strides: Strides of the levels made from the map; each is the map's times 4, 2, 1, 1/2 or 1/4.

    Raises:
        ValueError: A stride that cannot be made.
    """

    def __init__(
        self,
        backbone: vizoo.Backbone,
        channels: int = 256,
        *,
        extra_convs: bool = False,
        strides: Sequence[int] = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        width, stride = backbone.feature_info.channels()[-1], backbone.feature_info.reduction()[-1]
        for level in strides:
            self.add_module(f"simfp_{level.bit_length() - 1}", _simple_level(width, channels, stride, level))
        self.levels = tuple(strides)
        self.extra_blocks = ExtraLevels(channels, channels) if extra_convs else LastLevelMaxPool()
        self.channels = channels
        self.strides = _all_strides(strides, extra_convs)
        """Input pixels per position of each level."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One (B, channels, H, W) map per level, finest first, from the backbone's last map."""
        found = [self.get_submodule(f"simfp_{level.bit_length() - 1}")(maps[-1]) for level in self.levels]
        return self.extra_blocks(found, found, [str(level) for level in self.levels])[0]


def _simple_level(width: int, channels: int, stride: int, level: int) -> nn.Module:
    """From a plain backbone's map to a level."""
    layers: list[nn.Module] = []
    if stride == 4 * level:
        layers = [nn.ConvTranspose2d(width, width // 2, 2, 2), ChannelNorm(width // 2), nn.GELU()]
        layers += [nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
        width //= 4
    elif stride == 2 * level:
        layers = [nn.ConvTranspose2d(width, width // 2, 2, 2)]
        width //= 2
    elif level in (2 * stride, 4 * stride):
        layers = [nn.MaxPool2d(level // stride)]
    elif level != stride:
        raise ValueError(f"strides must be {stride}, that of the map, times or over 1, 2 or 4, got {level}")
    return nn.Sequential(*layers, ConvNorm(width, channels, 1), ConvNorm(channels, channels, 3))
