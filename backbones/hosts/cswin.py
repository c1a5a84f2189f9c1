"""CSwin's frame: overlapping embeddings and blocks whose heads share out stripes. See the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vizoo.ops import window_attention

from ..base import (
    Backbone,
    Stage,
    check_heads,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    make_classifier,
)
from ..fusing import fold_neighbours
from ..layers import DropPath, LayerNorm, Mlp, convolve, pad_to_multiple
from .parts import MakeNorm, attend, check_positive, check_stages, fold_norm, init_host


@dataclass(frozen=True, kw_only=True)
class CswinConfig:
    """Configuration of CSwin's frame.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dim: Channels of the first stage; doubled at every further one.
        depths: Blocks per stage.
        num_heads: Attention heads per stage; they divide the stage's channels.
        split_size: Width of the stripes of softmax attention.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dim: int = 64
    depths: tuple[int, ...] = (2, 4, 18, 1)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    split_size: int = 7
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    output_norms: bool = False

    def __post_init__(self) -> None:
        check_stages(depths=self.depths, num_heads=self.num_heads)
        check_positive(
            depths=self.depths, embed_dim=self.embed_dim, split_size=self.split_size, mlp_ratio=self.mlp_ratio
        )
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.channels, self.num_heads)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per stage."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


class CswinBlock(nn.Module):
    """Pre-norm block whose mixer is one or several branches between shared projections.

    A branch is called with its queries, keys and values (B, H, W, 3, C / branches) and the same channels of the
    block's input before its norm, (B, H, W, C / branches); it gives (B, H, W, C / branches).

    Args:
        channels: Channels of the map.
        branches: The branches; each has an equal part of the channels, in this order.
        hidden: Hidden channels of the MLP.
        drop_path: Rate of stochastic depth.
        norm: Builds the norms.
    """

    def __init__(
        self, channels: int, branches: Sequence[nn.Module], hidden: int, drop_path: float, norm: MakeNorm
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm1 = norm(channels)
        self.proj = nn.Linear(channels, channels)
        self.attns = nn.ModuleList(branches)
        self.mlp = Mlp(channels, hidden)
        self.norm2 = norm(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.proj(self.mix(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor) -> Tensor:
        """What the branches give, side by side, (B, H, W, C)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1))
        if len(self.attns) == 1:
            return self.attns[0](qkv, x)
        parts = zip(self.attns, qkv.chunk(len(self.attns), -1), x.chunk(len(self.attns), -1), strict=True)
        return torch.cat([branch(part, inputs) for branch, part, inputs in parts], -1)

    def fuse_(self) -> None:
        """Fold each norm into the layer that reads it."""
        fold_norm(self, "norm1", [self.qkv])
        fold_norm(self, "norm2", [self.mlp.fc1])


class StripeAttention(nn.Module):
    """Softmax attention inside stripes of a map, or on the whole map, plus a depthwise convolution of the values.

    The convolution, CSwin's locally-enhanced position encoding, finds zeros beside a stripe.

    Args:
        channels: Channels of the branch.
        heads: Its attention heads.
        rows: Height of a stripe; None for that of the map.
        columns: Width of a stripe; None for that of the map.
    """

    def __init__(self, channels: int, heads: int, rows: int | None = None, columns: int | None = None) -> None:
        super().__init__()
        self.heads, self.rows, self.columns = heads, rows, columns
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, qkv: Tensor, x: Tensor) -> Tensor:
        """(B, H, W, 3, C) to (B, H, W, C)."""
        heads, v = qkv.unflatten(-1, (self.heads, -1)), qkv[:, :, :, 2]
        if self.rows is None and self.columns is None:
            return attend(heads.flatten(1, 2)).view(x.shape) + convolve(self.get_v, v)
        window = (self.rows or x.shape[1], self.columns or x.shape[2])
        return window_attention(heads, window=window).flatten(3) + self._convolve_stripes(v)

    def _convolve_stripes(self, v: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape: zeros between stripes keep them apart."""
        cut = [(axis, width) for axis, width in ((1, self.rows), (2, self.columns)) if width is not None]
        sides = v.shape
        for axis, width in cut:
            v = _insert_zeros(v, axis, width)
        out = convolve(self.get_v, v)
        for axis, width in cut:
            place = torch.arange(sides[axis], device=v.device)
            out = out.index_select(axis, place + place // width)
        return out


def _insert_zeros(x: Tensor, axis: int, width: int) -> Tensor:
    """A row or column of zeros behind every `width` ones: traces would fix the length of an axis of stripes."""
    side = x.shape[axis]
    place = torch.arange(side + side // width, device=x.device)
    behind = place // (width + 1)
    y = x.index_select(axis, (place - behind).clamp(max=side - 1))
    kept = (place - behind * (width + 1) < width).to(x.dtype)
    return y * kept.view([-1 if each == axis else 1 for each in range(x.ndim)])


def stripe_branches(config: CswinConfig, stage: int) -> list[nn.Module]:
    """Branches of CSwin's own attention: vertical and horizontal stripes, in the last stage the whole map.

    Raises:
        ValueError: Heads cannot be shared by two branches.
    """
    channels, heads = config.channels[stage], config.num_heads[stage]
    if stage == len(config.depths) - 1:
        return [StripeAttention(channels, heads)]
    if heads % 2:
        raise ValueError(
            f"half of the heads attend in vertical stripes, half in horizontal ones: num_heads must be even in stage "
            f"{stage}, got {heads}"
        )
    vertical = StripeAttention(channels // 2, heads // 2, columns=config.split_size)
    return [vertical, StripeAttention(channels // 2, heads // 2, rows=config.split_size)]


class ConvEmbed(nn.Sequential):
    """Stem: overlapping patches of 7 x 7 pixels at stride 4, normalised; entry 1 only moves the channels."""

    def __init__(self, in_chans: int, channels: int, norm: nn.Module) -> None:
        super().__init__(nn.Conv2d(in_chans, channels, 7, 4, padding=2), nn.Identity(), norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/4), ceil(W/4), C)."""
        x = pad_to_multiple(x, 4).contiguous(memory_format=torch.channels_last)  # so the map comes as (B, H, W, C)
        return self[2](self[0](x).permute(0, 2, 3, 1))

    def fuse_(self) -> None:
        """Fold the norm into the convolution in front of it."""
        fold_neighbours(self, ("0", "2"))


class Merge(nn.Module):
    """Halve the map by a 3 x 3 convolution and normalise it."""

    def __init__(self, channels: int, out_channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, 2, padding=1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), C')."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def fuse_(self) -> None:
        """Fold the norm into the convolution in front of it."""
        fold_neighbours(self, ("conv", "norm"))


class CswinHost(Backbone):
    """CSwin's frame: a pyramid of overlapping convolutions, between them blocks of several branches.

    Args:
        config: The design.
        branches: Builds the branches of a block, from the numbers of its stage and of the block in it.
        norm: Builds a norm.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    stem_name = "stage1_conv_embed.0"

    def __init__(
        self,
        config: CswinConfig,
        branches: Callable[[int, int], Sequence[nn.Module]],
        norm: MakeNorm = LayerNorm,
        **kwargs: Any,
    ) -> None:
        stages = [Stage(f"stage{i + 1}", c, 4 * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stage1_conv_embed = ConvEmbed(self.in_chans, config.embed_dim, norm(config.embed_dim, keep_float32=True))
        for i, channels in enumerate(config.channels[: self.built_stages]):
            if i:
                self.add_module(f"merge{i}", Merge(channels // 2, channels, norm(channels, keep_float32=True)))
            hidden = int(channels * config.mlp_ratio)
            blocks = (CswinBlock(channels, branches(i, j), hidden, rate, norm) for j, rate in enumerate(rates[i]))
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = norm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        init_host(self)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.stage1_conv_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(getattr(self, f"stage{index + 1}"), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Convolution and norm in front of stage `index`; see `Backbone`."""
        return getattr(self, f"merge{index}")(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def fuse_final_norm_(self) -> None:
        """Fold the final norm into the classifier: the mean over positions commutes with it."""
        fold_norm(self, "norm", [self.get_classifier()])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a merging goes with the last block before it."""
        if coarse:  # names count from 1
            blocks: list[Any] = [(rf"^(?:stage|merge){i + 1}\.", (i,)) for i in range(len(self.stages))]
        else:
            merges = [(rf"^merge{i}\.", (i, depth - 1)) for i, depth in enumerate(self.config.depths, 1)]
            blocks = [*merges, (r"^stage(\d+)\.(\d+)\.", None)]
        return {"stem": r"^stage1_conv_embed", "blocks": blocks}
