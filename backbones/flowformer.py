"""Flowformer: a pyramid of flow attention, in which tokens compete for what goes out and share what comes in.

Paper: Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022, arXiv 2202.06258. Official
code: thuml/Flowformer at 61f5d8c (MIT), `Flowformer_CV/flowformer.py`. It has nothing to do with the network for
optical flow of the same name.

Here is the vision model and its form of flow attention: every token sees all others, and the small constant that keeps
sums from zero is added to vectors and to their products alike. The repository's module for other models adds it to
vectors only, projects queries, keys and values apart, drops outputs at random, and has a causal form besides.

What differs from the official code, and why:

- Any image size runs; the official code takes one, and squares only. Images and maps are padded at the bottom and right
  until the last patch is whole, and the position table is resized.
- Maps stay (B, H, W, C), the layout of the shared operators.
- Sums over all tokens, which reach thousands, and the softmax over them are float32 in any precision; the official code
  rounds them to half precision under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from vizoo.ops import FlowConservation, linear_attention
from vizoo.ops.tracing import known
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
from .layers import DropPath, LayerNorm, Mlp, pad_to_multiple, resize_grid

STRIDE = 4
"""Stride of the stem; every further stage halves the map."""

EPS = 1e-6
"""Of all norms."""


@dataclass(frozen=True, kw_only=True)
class FlowformerConfig:
    """Configuration of a Flowformer.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position table; any other
            size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads, in every stage as many; they divide its channels.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        layer_scale: What the factors of the MLP branch's channels begin with.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 10, 3)
    num_heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    drop_path_rate: float = 0.2

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) > 0:
            raise ValueError(f"embed_dims and depths need one entry per stage, got {self.embed_dims} and {self.depths}")
        if min(*self.embed_dims, *self.depths) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "embed_dims, depths and mlp_ratio must be positive, got "
                f"{self.embed_dims}, {self.depths}, {self.mlp_ratio}"
            )
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.embed_dims, [self.num_heads] * len(self.embed_dims))

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of such an image."""
        rows, columns = (-(-side // STRIDE) for side in self.image_sides)
        return rows, columns


class FlowAttention(nn.Module):
    """Multi-head flow attention over the whole map (paper, section 3.2)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.heads, channels // self.heads)
        return self.proj(linear_attention(qkv, None, None, FlowConservation()).view(x.shape))


class FlowformerBlock(nn.Module):
    """Flow attention and MLP on residual branches, of which the second is scaled by channel."""

    def __init__(self, config: FlowformerConfig, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=EPS)
        self.attn = FlowAttention(channels, config.num_heads)
        self.norm2 = LayerNorm(channels, eps=EPS)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.gamma = nn.Parameter(torch.full((channels,), config.layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A convolution over patches that do not overlap."""

    def __init__(self, channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(channels, out_channels, side, side)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, ceil(H / side), ceil(W / side), out_channels)."""
        x = pad_to_multiple(x, self.side).contiguous(memory_format=torch.channels_last)
        return self.proj(x).permute(0, 2, 3, 1)


class Flowformer(Backbone):
    """Flowformer; see the module's docstring for the paper and for what differs from the official code.

    Args:
        config: The design.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"^pos_embed$"
    stem_name = "patch_embed.0.proj"

    def __init__(self, config: FlowformerConfig, **kwargs: Any) -> None:
        stages = [Stage(f"blocks.{i}", c, STRIDE * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        widths = config.embed_dims[: self.built_stages]
        embeds = [PatchEmbed(c, c_next, 2) for c, c_next in pairwise(widths)]
        self.patch_embed = nn.ModuleList([PatchEmbed(self.in_chans, widths[0], STRIDE), *embeds])
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(config.grid), widths[0]))
        self.blocks = nn.ModuleList(
            self._make_stage(width, stage_rates) for width, stage_rates in zip(widths, rates, strict=False)
        )
        if not self.features_only:
            self.norm = LayerNorm(self.num_features, keep_float32=True, eps=EPS)
            self.head = make_classifier(self.num_features, self.num_classes)
        self.apply(_init_module)

    def _make_stage(self, channels: int, rates: Sequence[float]) -> nn.ModuleList:
        return nn.ModuleList(FlowformerBlock(self.config, channels, rate) for rate in rates)

    def stem(self, x: Tensor) -> Tensor:
        """Image to the first map; see `Backbone`."""
        x = self.patch_embed[0](x)
        return x + self.positions(x.shape[1], x.shape[2])

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position table as a map (1, H, W, C)."""
        table: Tensor = self.pos_embed
        grid = self.config.grid
        if not (known(rows == grid[0]) and known(columns == grid[1])):
            table = resize_grid(table, grid, (rows, columns))
        return table.unflatten(1, (rows, columns))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(nn.ModuleList, self.blocks[index]), x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """The convolution in front of stage `index`; see `Backbone`."""
        return self.patch_embed[index](x.permute(0, 3, 1, 2))

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize the position table of a square image; see `Backbone`."""
        table, grid = state.get("pos_embed"), self.config.grid
        if table is None or table.shape[1] == math.prod(grid):
            return {}
        side = math.isqrt(table.shape[1])
        if side**2 != table.shape[1]:
            return {}
        state["pos_embed"] = resize_grid(table, (side, side), grid)
        return {"pos_embed": f"positions of {side} x {side} to {grid[0]} x {grid[1]} patches, bicubic"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; a downsampling goes with the block behind it."""
        stem, downsample = r"^(?:patch_embed\.0\.|pos_embed)", r"^patch_embed\.([1-9]\d*)"
        if coarse:
            return {"stem": stem, "blocks": [(downsample, None), (r"^blocks\.(\d+)", None)]}
        return {"stem": stem, "blocks": [(downsample, (0,)), (r"^blocks\.(\d+)\.(\d+)", None)]}


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):  # convolutions keep PyTorch's own initialisation
        init_linear(module)


OFFICIAL_LAYOUT = CheckpointLayout(
    name="official",
    marker=r"^blocks\.\d+\.\d+\.gamma$",
    # What a counter of operations left in checkpoints, and the authors leave out when they load one.
    ignored=(r"(^|\.)total_(ops|params)$",),
)

FOLDER = "https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886"

VARIANTS = {
    "flowformer_cv": Variant(
        config=FlowformerConfig(),
        weights={
            "in1k": Weights(
                url="",
                manual=f"Save the file of the ImageNet model from the folder {FOLDER}/",
                container="model",
                license="MIT",
                repository="thuml/Flowformer",
                commit="61f5d8c83907955a8bc226af03b81b59b2724c8f",
                input_size=(3, 224, 224),
                num_classes=1000,
                crop_pct=0.875,
                metrics={"top1": 80.6},
            )
        },
    ),
}

FAMILY = Family(
    name="flowformer",
    model=Flowformer,
    config=FlowformerConfig,
    variants=VARIANTS,
    mixer="linear attention",
    paper="Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, arXiv 2202.06258",
    layouts=(OFFICIAL_LAYOUT,),
    tiny={"img_size": 64, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": 4},
)
