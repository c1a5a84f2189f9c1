"""PVT's frame: four stages, each with an embedding of patches and a table of positions. See the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import (
    Backbone,
    Stage,
    check_heads,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    make_classifier,
)
from ..layers import LayerNorm, resize_grid
from .parts import (
    Block,
    MakeMixer,
    MakeNorm,
    MapEmbed,
    PatchEmbed,
    check_positive,
    check_stages,
    fold_norm,
    init_host,
    same_grid,
    square_grid,
)


@dataclass(frozen=True, kw_only=True)
class PvtConfig:
    """Configuration of PVT's frame.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position tables; any other
            size runs as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage; they divide the stage's channels.
        mlp_ratios: Hidden channels of the MLPs over the channels, per stage.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    img_size: int | tuple[int, int] = 224
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        fields: dict[str, Any] = {
            "embed_dims": self.embed_dims,
            "depths": self.depths,
            "num_heads": self.num_heads,
            "mlp_ratios": self.mlp_ratios,
        }
        check_stages(**fields)
        check_positive(**fields)
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads(self.embed_dims, self.num_heads)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map at `img_size`."""
        height, width = self.image_sides
        stride = 4 * 2**stage
        return -(-height // stride), -(-width // stride)


class PvtHost(Backbone):
    """PVT's frame without its class token: a pyramid of patch embeddings, each with a position table; no final norm.

    Args:
        config: The design.
        mixer: Builds the mixer of a block.
        norm: Builds a norm.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"^pos_embed\d+$"
    stem_name = "patch_embed1.proj"

    def __init__(self, config: PvtConfig, mixer: MakeMixer, norm: MakeNorm = LayerNorm, **kwargs: Any) -> None:
        stages = [Stage(f"block{i + 1}", c, 4 * 2**i) for i, c in enumerate(config.embed_dims)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        for i, channels in enumerate(config.embed_dims[: self.built_stages]):
            embed_norm = norm(channels, keep_float32=True)
            embed = (
                MapEmbed(config.embed_dims[i - 1], channels, 2, embed_norm)
                if i
                else PatchEmbed(self.in_chans, channels, 4, embed_norm)
            )
            hidden = int(channels * config.mlp_ratios[i])
            blocks = (
                Block(channels, mixer(i, j), hidden, rate, partial(norm, eps=1e-6)) for j, rate in enumerate(rates[i])
            )
            self.register_parameter(
                f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, math.prod(config.grid(i)), channels))
            )
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
        if not self.features_only:
            self.head = make_classifier(self.num_features, self.num_classes)
        init_host(self, r"^pos_embed\d+$")

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self._embed(0, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Patch embedding in front of stage `index`; see `Backbone`."""
        return self._embed(index, x)

    def _embed(self, index: int, x: Tensor) -> Tensor:
        x = getattr(self, f"patch_embed{index + 1}")(x)
        return x + self.positions(index, *x.shape[1:3])

    def positions(self, index: int, rows: int, columns: int) -> Tensor:
        """Position table (1, rows, columns, C) of a stage."""
        table, grid = getattr(self, f"pos_embed{index + 1}"), self.config.grid(index)
        if not same_grid(grid, (rows, columns)):
            table = resize_grid(table, grid, (rows, columns), "bilinear")
        return table.unflatten(1, (rows, columns))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(getattr(self, f"block{index + 1}"), x)

    def normalize(self, x: Tensor) -> Tensor:
        """Nothing: there is no final norm."""
        return x

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize position tables of square grids; see `Backbone`."""
        done = {}
        for index in range(len(self.stages)):
            name, new = f"pos_embed{index + 1}", self.config.grid(index)
            if name not in state or state[name].shape[1] == math.prod(new):
                continue
            old = square_grid(state[name].shape[1])
            if old is not None:
                state[name] = resize_grid(state[name], old, new, "bilinear")
                done[name] = f"positions of {old[0]} x {old[1]} to {new[0]} x {new[1]} patches, bilinear"
        return done

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; an embedding goes with the block behind it."""
        stem, embed = r"^(?:patch|pos)_embed1(?:\.|$)", r"^(?:patch|pos)_embed(\d+)"
        if not coarse:
            return {"stem": stem, "blocks": [(embed, (0,)), (r"^block(\d+)\.(\d+)", None)]}
        stages = range(len(self.stages))  # their names count from 1
        return {"stem": stem, "blocks": [(rf"^(?:(?:patch|pos)_embed|block){i + 1}(?:\.|$)", (i,)) for i in stages]}


class ReducedAttention(nn.Module):
    """PVT's softmax attention of all positions to the patches of a map, one key and value for each.

    Args:
        channels: Channels of the map.
        heads: Attention heads.
        reduction: Side of a patch; with 1 every position is a key.
        norm: Builds the norm of the patches.
    """

    def __init__(self, channels: int, heads: int, reduction: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.reads = ("q", "sr") if reduction > 1 else ("q", "kv")
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(self.reduce(x)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def reduce(self, x: Tensor) -> Tensor:
        """Map to the tokens that are keys: positions, or normalised patches, (B, N, C)."""
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).flatten(2).mT) if hasattr(self, "sr") else x.flatten(1, 2)

    def fuse_(self) -> None:
        """Fold the norm of the patches into what reads it."""
        if hasattr(self, "sr"):
            fold_norm(self, "norm", [self.kv])
