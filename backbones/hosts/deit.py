"""DeiT's frame: patches, a class token if there is one, and blocks of one width. See the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    PatchEmbed,
    attend,
    check_positive,
    fold_norm,
    init_host,
    same_grid,
    square_grid,
)


@dataclass(frozen=True, kw_only=True)
class DeitConfig:
    """Configuration of DeiT's frame.

    Attributes:
        img_size: Image side, or (height, width), the model is meant for, which fixes the position table; any other
            size runs as well.
        patch_size: Kernel and stride of the stem's convolution, and stride of every stage.
        embed_dim: Channels.
        depths: Blocks per stage; all stages are alike, so only their sum and where features are taken depends on it.
        num_heads: Attention heads; they divide the channels.
        mlp_ratio: Hidden channels of the MLP over the block's channels.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        class_token: Classify by a token in front of the patches; without it by the mean of all tokens.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 192
    depths: tuple[int, ...] = (3, 3, 3, 3)
    num_heads: int = 3
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.1
    class_token: bool = True

    def __post_init__(self) -> None:
        check_positive(
            depths=self.depths or (0,), embed_dim=self.embed_dim, patch_size=self.patch_size, mlp_ratio=self.mlp_ratio
        )
        check_size_and_rate(self.img_size, self.drop_path_rate)
        check_heads((self.embed_dim,), (self.num_heads,))

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of the image the model is meant for."""
        return image_sides(self.img_size)

    def grid(self, sides: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of these sides."""
        rows, columns = ((side + self.patch_size - 1) // self.patch_size for side in sides)
        return rows, columns


class DeitHost(Backbone):
    """DeiT's frame: blocks of one resolution on patches and, in front of them, a class token.

    Between stages, and from `forward_features`, come tokens (B, L, C). A mixer is called with tokens and grid (rows,
    columns): the last rows * columns tokens are the patches.

    Args:
        config: The design.
        mixer: Builds the mixer of a block.
        norm: Builds a norm.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"^(pos_embed|cls_token)$"
    stem_name = "patch_embed.proj"

    def __init__(self, config: DeitConfig, mixer: MakeMixer, norm: MakeNorm = LayerNorm, **kwargs: Any) -> None:
        ends = [sum(config.depths[: i + 1]) for i in range(len(config.depths))]
        stages = [Stage(f"blocks.{end - 1}", config.embed_dim, config.patch_size) for end in ends]
        super().__init__(config, stages, **kwargs)
        self.ends = ends
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        channels, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        tokens = math.prod(config.grid(config.image_sides)) + config.class_token
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, channels))
        self.patch_embed = PatchEmbed(self.in_chans, channels, config.patch_size, nn.Identity())
        self.blocks = nn.ModuleList(
            Block(channels, mixer(stage, j), hidden, rate, partial(norm, eps=1e-6))
            for stage in range(self.built_stages)
            for j, rate in enumerate(rates[stage])
        )
        if not self.features_only:
            self.norm = norm(channels, keep_float32=True, eps=1e-6)
            self.head = make_classifier(channels, self.num_classes)
        init_host(self, r"^(pos_embed|cls_token)$")

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens (B, L, C), the class token in front."""
        patches = self.patch_embed(x)
        tokens = patches.flatten(1, 2)
        if self.config.class_token:
            token = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat((token, tokens), 1)
        return tokens + self.positions(*patches.shape[1:3])

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position table (1, L, C) for a grid of patches."""
        grid = self.config.grid(self.config.image_sides)
        if same_grid(grid, (rows, columns)):
            return self.pos_embed
        return _resized(self.pos_embed, grid, (rows, columns), self.config.class_token)

    def stage(self, index: int, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """A part of the blocks on tokens of a grid of patches, that of an image of the model's size by default."""
        grid = grid or self.config.grid(self.config.image_sides)
        for number in range(self.ends[index] - self.config.depths[index], self.ends[index]):
            block = self.blocks[number]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return x

    def _walk(self, x: Tensor, wanted: Sequence[int]) -> list[tuple[int, Tensor]]:
        self._check_input(x)
        grid = self.config.grid(x.shape[2:])
        x = self.stem(x)
        found = []
        for index in range(wanted[-1] + 1):
            x = self.stage(index, x, grid)
            if any(index == each for each in wanted):  # Dynamo of torch 2.6 finds nothing in a list
                found.append((index, x))
        return found

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Nothing: all stages have one resolution."""
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """The class token, or without one the mean of all tokens; (B, num_features)."""
        return x[:, 0] if self.config.class_token else x.mean(1)

    def to_map(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """Tokens without the class token as a map; see `Backbone`."""
        x = x[:, 1:] if self.config.class_token else x
        return x.unflatten(1, self.config.grid(sides))

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Resize the position table of a square grid; see `Backbone`."""
        table, token = state.get("pos_embed"), self.config.class_token
        if table is None or table.shape[1] == self.pos_embed.shape[1]:
            return {}
        old, new = square_grid(table.shape[1] - token), self.config.grid(self.config.image_sides)
        if old is None:
            return {}
        state["pos_embed"] = _resized(table, old, new, token)
        return {"pos_embed": f"positions of {old[0]} x {old[1]} to {new[0]} x {new[1]} patches, bicubic"}

    def fuse_final_norm_(self) -> None:
        """Fold the final norm into the classifier: the mean of tokens, like the choice of one, is linear."""
        fold_norm(self, "norm", [self.get_classifier()])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, or per stage."""
        stem = r"^(?:patch_embed|pos_embed|cls_token)"
        if not coarse:
            return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None)]}
        starts = [end - depth for end, depth in zip(self.ends, self.config.depths, strict=True)]
        numbers = ["|".join(map(str, range(*ends))) for ends in zip(starts, self.ends, strict=True)]
        return {"stem": stem, "blocks": [(rf"^blocks\.(?:{each})\.", (i,)) for i, each in enumerate(numbers)]}


def _resized(table: Tensor, old: Sequence[int], new: Sequence[int], class_token: bool) -> Tensor:
    """A table of positions for another grid; a class token's row in front stays as it is."""
    if class_token:
        return torch.cat((table[:, :1], resize_grid(table[:, 1:], old, new)), 1)
    return resize_grid(table, old, new)


class TokenAttention(nn.Module):
    """Softmax attention of all tokens to all, in DeiT's frame."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) to the same shape, whatever the grid."""
        del grid
        return self.proj(attend(self.qkv(x).unflatten(-1, (3, self.heads, -1))))
