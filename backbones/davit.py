"""DaViT: a pyramid that mixes positions inside windows and, by turns, channels inside groups over the whole image.

Paper: Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv 2204.03645. Official code:
dingmyu/davit at fc79470 (MIT), `timm/models/davit.py`; for dense tasks `mmdet/mmdet/models/backbones/davit.py`.

What differs from the official code, and why:

- One class serves classification and dense tasks.
- Maps stay (B, H, W, C), the layout of the shared operators. Under autocast the depthwise convolutions read the map as
  it is and sum in float32; the official code rounds map and sum to half precision.
- The logits of channel attention are sums over all positions of an image, so they and their softmax stay in float32
  under autocast; the official code rounds them to half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops import channel_attention, window_attention
from vizoo.weights.record import Weights

from .base import (
    Backbone,
    CheckpointLayout,
    Family,
    Stage,
    Variant,
    check_heads,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    init_linear,
    make_classifier,
)
from .layers import DropPath, LayerNorm, Mlp, convolve, is_plain, pad_to_multiple

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""


@dataclass(frozen=True, kw_only=True)
class DavitConfig:
    """Configuration of a DaViT.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for; any other size runs as well.
        embed_dims: Channels per stage.
        depths: Pairs of a spatial and a channel block per stage.
        num_heads: Heads of the spatial attention, and groups of the channel attention, per stage; they divide the
            stage's channels.
        window_size: Side of the attention window.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        output_norms: Build the dense version: a norm per output map, no final norm and no classifier.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (1, 1, 3, 1)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1
    output_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.num_heads) > 0:
            raise ValueError(
                "embed_dims, depths and num_heads need one entry per stage, "
                f"got {self.embed_dims}, {self.depths} and {self.num_heads}"
            )
        if min(*self.embed_dims, *self.depths, *self.num_heads) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "embed_dims, depths, num_heads and mlp_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.num_heads}, {self.mlp_ratio}"
            )
        if self.window_size < 2:
            raise ValueError(f"window_size must be at least 2, got {self.window_size}")
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.embed_dims, self.num_heads)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)


class PositionEncoding(nn.Module):
    """Conditional position encoding: adds a depthwise 3 x 3 convolution, whose zero padding tells where borders are.

    Source: Chu et al., Conditional Positional Encodings for Vision Transformers, arXiv 2102.10882.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return convolve(self.proj, x, residual=True)


class SpatialAttention(nn.Module):
    """Multi-head attention inside the windows of a map, without shift and without position bias."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height, width, 3, self.heads, channels // self.heads)
        # The map is padded behind the norm, so what the projection makes of a padded position is its bias.
        out = window_attention(qkv, window=self.window, padding=self.qkv.bias.view(3, self.heads, -1))
        return self.proj(out.flatten(3))


class ChannelAttention(nn.Module):
    """Attention between the channels of each group, over all positions (paper, equation 4)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.groups, channels // self.groups)
        return self.proj(channel_attention(qkv).reshape(x.shape))


class DavitBlock(nn.Module):
    """Attention and MLP on residual branches, each behind a position encoding that lies outside the branch."""

    def __init__(self, channels: int, attention: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([PositionEncoding(channels), PositionEncoding(channels)])
        self.norm1 = LayerNorm(channels)
        self.attn = attention
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Overlapping patches of 7 x 7 pixels at stride 4, normalised."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, channels, 7, STRIDE, padding=3)
        self.norm = LayerNorm(channels, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/4), ceil(W/4), C)."""
        x = pad_to_multiple(x, STRIDE).contiguous(memory_format=torch.channels_last)  # so the map comes as (B, H, W, C)
        return self.norm(self._patches(x) if x.is_cuda and is_plain(self.proj) else self.proj(x).permute(0, 2, 3, 1))

    def _patches(self, x: Tensor) -> Tensor:
        """The same convolution as one matrix product over patches: on an H100 cuDNN took more than twice as long.

        A patch is one column wider than the filter, so that its numbers are a multiple of eight.
        """
        weight = F.pad(self.proj.weight, (0, 1))
        x = F.pad(x, (3, 4, 3, 3)).unfold(2, 7, STRIDE).unfold(3, 8, STRIDE)  # (B, in_chans, H/4, W/4, 7, 8)
        return F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3), weight.flatten(1), self.proj.bias)


class Downsample(nn.Module):
    """Halve the map by a 2 x 2 convolution behind a norm."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.proj = nn.Conv2d(channels, out_channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), C')."""
        x = pad_to_multiple(self.norm(x).permute(0, 3, 1, 2), 2)
        return self.proj(x).permute(0, 2, 3, 1)


class Davit(Backbone):
    """DaViT; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    stem_name = "patch_embeds.0.proj"

    def __init__(self, config: DavitConfig, **kwargs: Any) -> None:
        stages = [Stage(f"main_blocks.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, [2 * depth for depth in config.depths])
        widths = config.embed_dims[: self.built_stages]
        embeds = [Downsample(c, c_next) for c, c_next in pairwise(widths)]
        self.patch_embeds = nn.ModuleList([Stem(self.in_chans, widths[0]), *embeds])
        self.main_blocks = nn.ModuleList(self._make_stage(i, rates[i]) for i in range(self.built_stages))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norms = nn.LayerNorm(self.num_features)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(self._init_module)

    def _make_stage(self, index: int, rates: Sequence[float]) -> nn.ModuleList:
        config = self.config
        channels, heads = config.embed_dims[index], config.num_heads[index]
        pairs = nn.ModuleList()
        for spatial_rate, channel_rate in zip(rates[::2], rates[1::2], strict=True):
            spatial = SpatialAttention(channels, heads, config.window_size)
            channel = ChannelAttention(channels, heads)
            pairs.append(
                nn.Sequential(
                    DavitBlock(channels, spatial, config.mlp_ratio, spatial_rate),
                    DavitBlock(channels, channel, config.mlp_ratio, channel_rate),
                )
            )
        return pairs

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # convolutions keep PyTorch's own initialisation
            init_linear(module)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embeds[0](x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Pairs of blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(nn.ModuleList, self.main_blocks[index]), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Norm and convolution in front of stage `index`; see `Backbone`."""
        return self.patch_embeds[index](x)

    def normalize(self, x: Tensor) -> Tensor:
        """Nothing: the final norm acts on the pooled vector; see `pool`."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Mean over positions, then the final norm; (B, num_features)."""
        return self.norms(super().pool(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per pair of blocks, numbered through all stages; a downsampling goes with the pair behind it."""
        downsample = r"^patch_embeds\.([1-9]\d*)"
        if coarse:
            return {"stem": r"^patch_embeds\.0\.", "blocks": [(downsample, None), (r"^main_blocks\.(\d+)", None)]}
        return {
            "stem": r"^patch_embeds\.0\.",
            "blocks": [(downsample, (0,)), (r"^main_blocks\.(\d+)\.(\d+)", None)],
        }


OFFICIAL_LAYOUT = CheckpointLayout(name="official", marker=r"^main_blocks\.")

TIMM_LAYOUT = CheckpointLayout(
    name="timm",
    marker=r"^stem\.conv\.",
    renames=(
        (r"^stem\.conv\.", "patch_embeds.0.proj."),
        (r"^stem\.norm\.", "patch_embeds.0.norm."),
        (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
        (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
        (r"^stages\.(\d+)\.blocks\.(\d+\.\d+)\.cpe1\.", r"main_blocks.\1.\2.cpe.0."),
        (r"^stages\.(\d+)\.blocks\.(\d+\.\d+)\.cpe2\.", r"main_blocks.\1.\2.cpe.1."),
        (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
        (r"^head\.norm\.", "norms."),
        (r"^head\.fc\.", "head."),
    ),
)

PAGES = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk"


def _weights(name: str, page: str, top1: float, top5: float, params: int, gmacs: float) -> dict[str, Weights]:
    """The authors' file, which their host gives to a browser only, and the same weights as timm publishes them."""
    facts: dict[str, Any] = {
        "repository": "dingmyu/davit",
        "commit": "fc79470d99babab23e45e0087790fa23cfd10a02",
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "crop_pct": 0.9,
        "metrics": {"top1": top1, "top5": top5},
        "params": params,
        "macs": gmacs * 1e9,
    }
    by_hand = f"Save the file behind {PAGES}/{page}, or name the model {name}.in1k_timm for the same weights from timm"
    return {
        "in1k": Weights(url="", manual=by_hand, license="MIT", container="state_dict", **facts),
        "in1k_timm": Weights(
            url=f"hf://timm/{name}.msft_in1k/model.safetensors",
            license="Apache-2.0",
            note="the authors' weights as converted and published by timm; licence as stated there",
            **facts,
        ),
    }


_SMALL: dict[str, Any] = {"depths": (1, 1, 9, 1)}
_BASE: dict[str, Any] = {**_SMALL, "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE: dict[str, Any] = {**_SMALL, "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}

VARIANTS = {
    "davit_tiny": Variant(
        config=DavitConfig(),
        weights=_weights(
            "davit_tiny", "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB", 82.8, 96.2, 28_360_168, 4.54
        ),
    ),
    "davit_small": Variant(
        config=DavitConfig(**_SMALL),
        weights=_weights(
            "davit_small", "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO", 84.2, 96.9, 49_745_896, 8.80
        ),
    ),
    "davit_base": Variant(
        config=DavitConfig(**_BASE),
        weights=_weights(
            "davit_base", "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u", 84.6, 96.9, 87_954_408, 15.5
        ),
    ),
    # In the authors' code; they have not released its weights.
    "davit_large_window12_384": Variant(
        config=DavitConfig(**_LARGE, img_size=384, window_size=12), params=196.8, gmacs=103.0
    ),
}

FAMILY = Family(
    name="davit",
    model=Davit,
    config=DavitConfig,
    variants=VARIANTS,
    mixer="window attention",
    paper="DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645",
    layouts=(OFFICIAL_LAYOUT, TIMM_LAYOUT),
    tiny={
        "img_size": 64,
        "window_size": 4,
        "embed_dims": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
    },
)
