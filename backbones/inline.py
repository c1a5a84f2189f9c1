"""InLine: linear attention whose weights are scores minus their mean, in the frames of DeiT, PVT, Swin and CSwin.

Paper: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024, arXiv 2412.06590.
Official code: LeapLabTHU/InLine at e463a6f (no licence file; headers of what derives from Swin and CSwin name MIT).

Dividing scores by their sum lets queries that differ by a factor see the same. Subtracting the mean does not, and needs
no feature map. What is local comes from a 3 x 3 convolution of the values with filters that each image predicts.

What differs from the official code, and why:

- Any image size runs, in all four frames, see `hosts.py`. The official Swin, CSwin and DeiT take one square size; PVT
  fails where a later stage has as many tokens as its first position table.
- InLine's own blocks attend to the whole map at every size. In the frames of Swin and CSwin the official code gives
  them windows, which in all published settings are as large as the map. So `window_size` is that of softmax blocks.
- A Swin's stage mixes both kinds of blocks as `inline_blocks` counts them, where the official code takes letters.
- In CSwin's frame the fixed convolution of the values is added to the filters of the image: one convolution, not two.
- Shift masks and index tables are computed, never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vizoo.ops import MeanSubtraction, linear_attention
from vizoo.weights.record import NOT_STATED, Weights

from .base import CheckpointLayout, Family, Variant
from .hosts import (
    CswinConfig,
    CswinHost,
    DeitConfig,
    DeitHost,
    PvtConfig,
    PvtHost,
    ShiftedWindowAttention,
    SwinHost,
    stripe_branches,
)
from .swin import SwinConfig


class Filters(nn.Sequential):
    """Predicts a 3 x 3 filter for each channel of an image from the mean of its tokens, each head for its own."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(
            nn.Conv1d(channels, channels, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(channels, 9 * channels, 1, groups=heads),
        )

    def forward(self, mean: Tensor) -> Tensor:
        """(B, C) to (B, heads, C / heads, 3, 3)."""
        for layer in self:
            mean = _of_groups(layer, mean) if isinstance(layer, nn.Conv1d) else layer(mean)
        return mean.unflatten(1, (cast(nn.Conv1d, self[0]).groups, -1, 3, 3))


def _of_groups(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A grouped convolution of one position, (B, C) to (B, C'), as one product of matrices for each group."""
    x = x.unflatten(1, (conv.groups, -1)).transpose(0, 1)
    weight = conv.weight.view(conv.groups, -1, x.shape[2])
    assert conv.bias is not None  # it has one
    return torch.baddbmm(conv.bias.view(conv.groups, 1, -1), x, weight.mT).transpose(0, 1).flatten(1)


class InlineAttention(nn.Module):
    """InLine attention of tokens whose last ones are a map.

    Args:
        channels: Channels of the tokens.
        heads: Attention heads.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.make_projection(channels)
        self.proj = nn.Linear(channels, channels)
        self.residual = Filters(channels, heads)

    def make_projection(self, channels: int) -> None:
        """Create what `project` applies."""
        self.qkv = nn.Linear(channels, 3 * channels)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values of tokens as `linear_attention` takes them.

        (B, L, C) to (B, L, 3, heads, C / heads) of all and twice None, or to three (B, L, heads, C / heads).
        """
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)), None, None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) to the same shape; the last rows * columns tokens are a map of this grid."""
        q, k, v = self.project(x)
        filters = self.residual(x.mean(1))
        out = linear_attention(q, k, v, MeanSubtraction(), local_kernels=filters, grid=grid)
        return self.proj(out.flatten(2))


class MapAttention(InlineAttention):
    """The same of a map."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width = x.shape[1:3]
        return super().forward(x.flatten(1, 2), grid or (height, width)).view(x.shape)


class PvtAttention(MapAttention):
    """The same with PVT's projections: one for queries, one for keys and values."""

    reads = ("q", "kv")

    def make_projection(self, channels: int) -> None:
        """Create what `project` applies."""
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values; see `InlineAttention`."""
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.q(x).unflatten(-1, (self.heads, -1)), k, v


class CswinBranch(nn.Module):
    """InLine attention between the projections of a CSwin block, with CSwin's own convolution of the values.

    Its filters are predicted from the block's input before the norm.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.residual = Filters(channels, heads)

    def forward(self, qkv: Tensor, x: Tensor) -> Tensor:
        """(B, H, W, 3, C) and the block's input (B, H, W, C) to (B, H, W, C)."""
        height, width = x.shape[1:3]
        qkv = qkv.unflatten(-1, (self.heads, -1)).flatten(1, 2)
        filters = self.residual(x.mean((1, 2))) + self.get_v.weight.view(self.heads, -1, 3, 3)
        out = linear_attention(qkv, None, None, MeanSubtraction(), local_kernels=filters, grid=(height, width))
        assert self.get_v.bias is not None  # it has one
        return out.view(x.shape) + self.get_v.bias.to(out.dtype)


def _check_inline_blocks(inline_blocks: tuple[int, ...], depths: tuple[int, ...]) -> None:
    if len(inline_blocks) != len(depths) or any(not 0 <= n <= d for n, d in zip(inline_blocks, depths, strict=True)):
        raise ValueError(
            "inline_blocks must count for each stage how many of its blocks, the first ones, are InLine: at most "
            f"{depths}, got {inline_blocks}"
        )


class InlineDeit(DeitHost):
    """InLine-DeiT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: DeitConfig, **kwargs: Any) -> None:
        super().__init__(config, lambda stage, block: InlineAttention(config.embed_dim, config.num_heads), **kwargs)


class InlinePvt(PvtHost):
    """InLine-PVT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: PvtConfig, **kwargs: Any) -> None:
        def mixer(stage: int, block: int) -> nn.Module:
            return PvtAttention(config.embed_dims[stage], config.num_heads[stage])

        super().__init__(config, mixer, **kwargs)


@dataclass(frozen=True, kw_only=True)
class InlineSwinConfig(SwinConfig):
    """Configuration of an InLine-Swin; see `SwinConfig` for the other fields.

    Attributes:
        window_size: Side of the window of softmax blocks; a stage whose map is smaller at `img_size` takes that side.
        inline_blocks: InLine blocks per stage, which come first and attend to the whole map. The other blocks are
            Swin's, every second one shifted.
    """

    inline_blocks: tuple[int, ...] = (2, 2, 6, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_inline_blocks(self.inline_blocks, self.depths)


class InlineSwin(SwinHost):
    """InLine-Swin; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: InlineSwinConfig, **kwargs: Any) -> None:
        def mixer(stage: int, block: int) -> nn.Module:
            if block < config.inline_blocks[stage]:
                return MapAttention(config.channels[stage], config.num_heads[stage])
            return ShiftedWindowAttention(config, stage, shifted=block % 2 == 1)

        super().__init__(config, mixer, **kwargs)


@dataclass(frozen=True, kw_only=True)
class InlineCswinConfig(CswinConfig):
    """Configuration of an InLine-CSwin; see `CswinConfig` for the other fields.

    Attributes:
        inline_blocks: InLine blocks per stage, which come first and attend to the whole map. The other blocks are
            CSwin's.
    """

    inline_blocks: tuple[int, ...] = (2, 4, 0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_inline_blocks(self.inline_blocks, self.depths)


class InlineCswin(CswinHost):
    """InLine-CSwin; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    def __init__(self, config: InlineCswinConfig, **kwargs: Any) -> None:
        def branches(stage: int, block: int) -> list[nn.Module]:
            if block < config.inline_blocks[stage]:
                return [CswinBranch(config.channels[stage], config.num_heads[stage])]
            return stripe_branches(config, stage)

        super().__init__(config, branches, **kwargs)


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"\.residual\.0\.weight$",
    ignored=(r"relative_position_index$", r"attn_mask$"),
)


def _variant(config: Any, share: str, top1: float, params: float, gmacs: float, container: str = "model") -> Variant:
    record = Weights(
        url=f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1",
        license=NOT_STATED,
        repository="LeapLabTHU/InLine",
        commit="e463a6f4dbb95893726b294ff83f61a58644bf6e",
        container=container,
        input_size=(3, *config.image_sides),
        num_classes=1000,
        crop_pct=0.875,
        metrics={"top1": top1},
        params=round(params * 1e6),
        macs=gmacs * 1e9,
    )
    return Variant(config=config, weights={"in1k": record})


def _swin(share: str, top1: float, params: float, gmacs: float, **design: Any) -> Variant:
    return _variant(InlineSwinConfig(**design), share, top1, params, gmacs)


def _deit(share: str, top1: float, params: float, gmacs: float, **design: Any) -> Variant:
    return _variant(DeitConfig(**design), share, top1, params, gmacs)


def _pvt(share: str, top1: float, params: float, gmacs: float, **design: Any) -> Variant:
    return _variant(PvtConfig(num_heads=(2, 4, 10, 16), **design), share, top1, params, gmacs)


def _cswin(share: str, top1: float, params: float, gmacs: float, **design: Any) -> Variant:
    return _variant(InlineCswinConfig(**design), share, top1, params, gmacs, "state_dict_ema")


# Millions of parameters are those of the authors' code where their README has others: 30 for Swin-T, 50.2 for PVT-L and
# 25, 43 and 96 for CSwin.
_SWIN_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_CSWIN_SMALL: dict[str, Any] = {"depths": (3, 6, 29, 2), "inline_blocks": (3, 6, 0, 0)}
_CSWIN_BASE: dict[str, Any] = {**_CSWIN_SMALL, "embed_dim": 96, "num_heads": (4, 8, 16, 32)}

SWIN_VARIANTS = {
    "inline_swin_tiny": _swin("32810869fcc34410966b", 82.4, 29.2, 4.5, drop_path_rate=0.2),
    "inline_swin_small": _swin(
        "e9657fd247c04c7cb1a1", 83.6, 50, 8.7, depths=(2, 2, 18, 2), inline_blocks=(2, 2, 0, 0), drop_path_rate=0.3
    ),
    "inline_swin_base": _swin(
        "bf23564bb64c420aafe1", 84.1, 88, 15.4, **_SWIN_BASE, inline_blocks=(2, 2, 2, 0), drop_path_rate=0.5
    ),
}
DEIT_VARIANTS = {
    "inline_deit_tiny": _deit("1d6b8191ad6d4114b291", 74.5, 6.5, 1.1, embed_dim=192, num_heads=6),
    "inline_deit_small": _deit("2f3898b07e9247f3beb3", 80.2, 16.7, 5.0, embed_dim=320, num_heads=10, img_size=288),
    "inline_deit_base": _deit("10bdd726d4b0435eb34e", 82.3, 23.8, 17.2, embed_dim=384, num_heads=12, img_size=448),
}
PVT_VARIANTS = {
    "inline_pvt_tiny": _pvt("90ac52b1555b401eb5e6", 78.2, 12.0, 2.0),
    "inline_pvt_small": _pvt("1ab953b2479d433080a3", 82.0, 21.6, 3.9, depths=(3, 4, 6, 3)),
    "inline_pvt_medium": _pvt("a72aec31e6084bc0a280", 83.2, 37.6, 6.9, depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "inline_pvt_large": _pvt("efd91318ba964f01b288", 83.6, 51.2, 10.2, depths=(3, 8, 27, 3), drop_path_rate=0.3),
}
CSWIN_VARIANTS = {
    "inline_cswin_tiny": _cswin("49fa2ecc543647c4b970", 83.2, 20.6, 4.3, drop_path_rate=0.2),
    "inline_cswin_small": _cswin("59f4e65f776f4052b93c", 83.8, 33.0, 6.8, **_CSWIN_SMALL, drop_path_rate=0.4),
    "inline_cswin_base": _cswin("91e17121df284ae38521", 84.5, 73.4, 14.9, **_CSWIN_BASE, drop_path_rate=0.5),
}

PAPER = "Bridging the Divide: Reconsidering Softmax and Linear Attention, NeurIPS 2024, arXiv 2412.06590"

FAMILIES = (
    Family(
        name="inline_swin",
        model=InlineSwin,
        config=InlineSwinConfig,
        variants=SWIN_VARIANTS,
        mixer="linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT,),
        bias_tables=r"relative_position_bias_table$",
        tiny={
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 2, 4),
            "inline_blocks": (1, 1, 1, 0),
        },
    ),
    Family(
        name="inline_deit",
        model=InlineDeit,
        config=DeitConfig,
        variants=DEIT_VARIANTS,
        mixer="linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT,),
        tiny={"img_size": 64, "patch_size": 8, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": 2},
    ),
    Family(
        name="inline_pvt",
        model=InlinePvt,
        config=PvtConfig,
        variants=PVT_VARIANTS,
        mixer="linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT,),
        tiny={
            "img_size": 64,
            "embed_dims": (16, 16, 32, 32),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "mlp_ratios": (2, 2, 2, 2),
        },
    ),
    Family(
        name="inline_cswin",
        model=InlineCswin,
        config=InlineCswinConfig,
        variants=CSWIN_VARIANTS,
        mixer="linear attention",
        paper=PAPER,
        layouts=(OFFICIAL_LAYOUT,),
        tiny={
            "img_size": 64,
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 4, 4),
            "split_size": 3,
            "inline_blocks": (1, 1, 0, 0),
        },
    ),
)
