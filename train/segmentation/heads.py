"""Decode heads: UPerNet, Semantic FPN with its neck, an all-MLP head, and the convolutional auxiliary head.

UPerNet: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221.
Semantic FPN: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446.
All-MLP head: Xie et al., "SegFormer", NeurIPS 2021, arXiv 2105.15203.
Parameter names of the first two, the neck and the auxiliary head are those of mmsegmentation's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from .layers import Conv, ConvNormAct, Head, check_widths, init_head, init_neck, resize


@MODELS.register_module()
class UPerHead(Head):
    """UPerNet: pyramid pooling of the coarsest map, a feature pyramid, and all its levels fused at the finest size.

    Args:
        in_channels: Channels of each map, finest first.
        num_classes: Classes of the logits.
        channels: Channels inside the head.
        pool_scales: Sides of the maps that the coarsest one is pooled to.
        dropout: Share of channels that training drops in front of the classifier.

    Raises:
        ValueError: Fewer than 2 maps, no pooling, or values that `Head` refuses.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, channels, dropout)
        *fine, coarse = check_widths(in_channels, 2, "UPerHead")
        if not pool_scales or min(pool_scales) < 1:
            raise ValueError(f"pool_scales must be sides of 1 or more, got {tuple(pool_scales)}")
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormAct(coarse, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvNormAct(coarse + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in fine)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in fine)
        self.fpn_bottleneck = ConvNormAct((len(fine) + 1) * channels, channels, 3)
        init_head(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) at the size of the finest map.

        Raises:
            ValueError: A batch of one image in training, of which a map pooled to one pixel leaves nothing to norm.
        """
        self._check_batch(len(maps[0]))
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pool(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        fused = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        size = fused[0].shape[2:]
        return self.classify(self.fpn_bottleneck(torch.cat([resize(x, size) for x in fused], 1)))

    def pool(self, x: Tensor) -> Tensor:
        """The coarsest map (B, C, h, w) beside its pooled versions, fused; (B, channels, h, w)."""
        pooled = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))

    def _check_batch(self, images: int) -> None:
        norms = [m for m in self.psp_modules.modules() if isinstance(m, _BatchNorm) and m.training]
        if images == 1 and norms and not isinstance(norms[0], SyncBatchNorm):
            raise ValueError("UPerHead norms maps pooled to one pixel: training needs at least 2 images a batch, got 1")


@MODELS.register_module()
class FPN(nn.Module):
    """Feature pyramid network: maps of one width, each with what the coarser ones know.

    Args:
        in_channels: Channels of each map, finest first.
        channels: Channels of every output.

    Attributes:
        out_channels: Channels of each output.

    Raises:
        ValueError: Fewer than 2 maps.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        widths = check_widths(in_channels, 2, "FPN")
        self.lateral_convs = nn.ModuleList(Conv(width, channels, 1) for width in widths)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, 3) for _ in widths)
        self.out_channels = (channels,) * len(widths)
        init_neck(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels, h, w) of the inputs' sizes."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


@MODELS.register_module()
class SemanticFPNHead(Head):
    """Semantic FPN: each level is doubled, a convolution at a time, until it has the finest size; then all are summed.

    Args:
        in_channels: Channels of each map, finest first; each map has half the side of the one before.
        num_classes: Classes of the logits.
        channels: Channels inside the head.
        dropout: Share of channels that training drops in front of the classifier.

    Raises:
        ValueError: No map, or values that `Head` refuses.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 128, dropout: float = 0.1) -> None:
        super().__init__(num_classes, channels, dropout)
        widths = check_widths(in_channels, 1, "SemanticFPNHead")
        self.scale_heads = nn.ModuleList(_doublings(width, channels, times) for times, width in enumerate(widths))
        init_head(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) at the size of the finest map."""
        total, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:  # a map with an odd side is doubled past the finest one
            total = total + resize(x, total.shape[2:])
        return self.classify(total)


def _doublings(in_channels: int, channels: int, times: int) -> nn.Sequential:
    """`times` times a convolution and a doubling of both sides; a convolution alone for the finest map."""
    layers: list[nn.Module] = [ConvNormAct(in_channels, channels, 3)]
    for step in range(times):
        layers += [ConvNormAct(channels, channels, 3)] if step else []
        layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
    return nn.Sequential(*layers)


@MODELS.register_module()
class MLPHead(Head):
    """SegFormer's head: every map linearly to one width, all fused linearly at the finest size.

    Fusing is linear, and so is resizing: each map is multiplied by its part of the fusion's weights before it is
    resized, which gives the same sum with a third of the operations and no concatenated map.

    Args:
        in_channels: Channels of each map, finest first.
        num_classes: Classes of the logits.
        channels: Channels inside the head.
        dropout: Share of channels that training drops in front of the classifier.

    Raises:
        ValueError: No map, or values that `Head` refuses.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__(num_classes, channels, dropout)
        widths = check_widths(in_channels, 1, "MLPHead")
        self.linears = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.fusion_conv = ConvNormAct(len(widths) * channels, channels, 1)
        init_head(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) at the size of the finest map."""
        size = maps[0].shape[2:]
        weights = self.fusion_conv.conv.weight.chunk(len(self.linears), 1)
        parts = [F.conv2d(linear(x), w) for linear, w, x in zip(self.linears, weights, maps, strict=True)]
        fused = parts[0]
        for part in parts[1:]:
            fused = fused + resize(part, size)
        return self.classify(self.fusion_conv.normalize(fused))


@MODELS.register_module()
class FCNHead(Head):
    """Convolutions and a classifier on one map; in training, beside a decode head.

    Args:
        in_channels: Channels of each map, finest first.
        num_classes: Classes of the logits.
        channels: Channels inside the head.
        in_index: The map it reads; negative ones count from the end.
        num_convs: 3 x 3 convolutions in front of the classifier.
        dropout: Share of channels that training drops in front of the classifier.

    Raises:
        ValueError: A map that is not there, no convolution, or values that `Head` refuses.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        in_index: int = 2,
        num_convs: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, channels, dropout)
        if not -len(in_channels) <= in_index < len(in_channels):
            raise ValueError(f"in_index must name one of the {len(in_channels)} maps, got {in_index}")
        if num_convs < 1:
            raise ValueError(f"num_convs must be at least 1, got {num_convs}")
        self.in_index = in_index
        widths = [in_channels[in_index]] + [channels] * (num_convs - 1)
        self.convs = nn.Sequential(*(ConvNormAct(width, channels, 3) for width in widths))
        init_head(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) at the size of the map it reads."""
        return self.classify(self.convs(maps[self.in_index]))
