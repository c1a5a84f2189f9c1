"""Norms of convolutions in necks and heads."""

from __future__ import annotations

from torch import Tensor, nn

from vizoo.backbones.base import nearest
from vizoo.backbones.layers import LayerNorm


class ChannelNorm(LayerNorm):
    """Layer norm of the channels at each position of a map.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": ChannelNorm}


def norm_layer(name: str) -> type[nn.Module]:
    """The class of a norm by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}; {nearest(name, NORMS)}")
    return NORMS[name]
