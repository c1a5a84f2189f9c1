"""A neck for plain backbones, whose maps have all one size."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn

from .layers import check_widths

FACTORS = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class Rescale(nn.Module):
    """Enlarges and shrinks the maps of a plain backbone to a pyramid, as the segmenters of BEiT and Vim do.

    Transposed convolutions enlarge, maxima shrink. Parameters are named as in these segmenters, `fpn1` on.

    Args:
        in_channels: Channels of each map, earliest first; a single map is taken for every level.
        factors: Side of each level over the side of its map: 4, 2, 1, 1/2 or 1/4. Those of stride 16 give strides 4 to
            32; with stride 8 it takes (2, 1, 1/2, 1/4).

    Attributes:
        out_channels: Channels of each level.

    Raises:
        ValueError: Another factor, or not one map for each.
    """

    def __init__(self, in_channels: Sequence[int], factors: Sequence[float] = FACTORS) -> None:
        super().__init__()
        widths = check_widths(in_channels, 1, "Rescale")
        if len(widths) not in (1, len(factors)):
            raise ValueError(
                f"Rescale needs one map, or one for each of its factors {tuple(factors)}, got {len(widths)}"
            )
        self.out_channels = widths * len(factors) if len(widths) == 1 else widths
        self.levels = len(factors)
        for number, (width, factor) in enumerate(zip(self.out_channels, factors, strict=True), 1):
            self.add_module(f"fpn{number}", _resizer(width, factor))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, factor * h, factor * w) of maps (B, C, h, w)."""
        found = list(maps) * (self.levels // len(maps))
        return [self.get_submodule(f"fpn{number}")(x) for number, x in enumerate(found, 1)]


def _resizer(width: int, factor: float) -> nn.Module:
    """What brings a map of this width to `factor` times its sides."""
    if factor == 4:
        return nn.Sequential(_doubling(width), nn.BatchNorm2d(width), nn.GELU(), _doubling(width))
    if factor == 2:
        return nn.Sequential(_doubling(width))
    if factor == 1:
        return nn.Identity()
    if factor in (0.5, 0.25):
        return nn.MaxPool2d(round(1 / factor))
    raise ValueError(f"factors must be 4, 2, 1, 0.5 or 0.25, got {factor}")


def _doubling(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, 2, 2)
