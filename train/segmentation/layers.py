"""What segmentation heads are made of; parameter names are those of published checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Module):
    """Convolution without bias that keeps the map's size, batch norm, ReLU.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel: Odd side of the kernel.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        return self.normalize(self.conv(x))

    def normalize(self, x: Tensor) -> Tensor:
        """What follows the convolution."""
        return F.relu(self.bn(x), inplace=True)


class Conv(nn.Module):
    """A convolution with bias that keeps the map's size, under the name it has in checkpoints."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        return self.conv(x)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, H, W) at another height and width: bilinear, half-pixel centres, without antialiasing."""
    size = (int(size[0]), int(size[1]))
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def init_head(head: nn.Module) -> None:
    """Kaiming normal (fan-out) convolutions without bias; classifiers normal 0.01, as published heads start."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.endswith("conv_seg"):
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Head(nn.Module):
    """Base of the heads: maps of a pyramid, finest first, to logits (B, num_classes, height, width) of its own stride.

    Args:
        num_classes: Classes of the logits.
        channels: Channels of the map in front of the classifier.
        dropout: Share of its channels that training drops.

    Raises:
        ValueError: Fewer than 2 classes, no channels, or a share outside [0, 1).
    """

    def __init__(self, num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def classify(self, x: Tensor) -> Tensor:
        """Dropout and the classifier."""
        return self.conv_seg(self.dropout(x))


def init_neck(neck: nn.Module) -> None:
    """Xavier uniform convolutions, as published pyramids start."""
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_widths(in_channels: Sequence[int], least: int, what: str) -> tuple[int, ...]:
    """The channels of a pyramid's maps, if there are enough maps.

    Raises:
        ValueError: Fewer maps than `least`.
    """
    if len(in_channels) < least:
        raise ValueError(f"{what} needs at least {least} maps, the backbone gives {len(in_channels)}: set out_indices")
    return tuple(in_channels)
