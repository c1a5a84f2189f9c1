"""Four well-known frames around a token mixer: DeiT, PVT, Swin and CSwin, which several families put theirs into.

Papers: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021, arXiv
2012.12877; Wang et al., "Pyramid Vision Transformer", ICCV 2021, arXiv 2102.12122; Liu et al., "Swin Transformer", ICCV
2021, arXiv 2103.14030; Dong et al., "CSWin Transformer", CVPR 2022, arXiv 2107.00652.

A frame is a `Backbone` that takes two functions: `mixer(stage, block)` builds what mixes the tokens of a block, and
`norm(channels, eps=..., keep_float32=...)` builds every norm. Parameters have the names that DeiT, PVT, Swin and CSwin
gave them. A mixer takes and gives a map (B, H, W, C); in DeiT's frame tokens (B, L, C) and their grid; in CSwin's frame
it is a list of branches that share the projections, see `CswinBlock`. The softmax attention of each frame is here, too.

What differs from the original frames, and why:

- Any image size runs. An image or map that patches do not divide is padded with zeros at the bottom and right, and
  position tables are resized: PVT's bilinearly, as its authors do, DeiT's bicubically.
- DeiT's has stages of equal size, so that features can be taken from several depths; stages of 12 blocks are thirds.
- PVT's spatial reduction leaves out the rows and columns that do not fill a patch, as its authors' does.
- CSwin's stripes are padded at the bottom and right with zero queries, keys and values. At every size, the last stage
  attends to the whole map and stripes are as long as the map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vizoo.ops import window_attention
from vizoo.ops.tracing import known

from .base import (
    Backbone,
    Stage,
    check_heads,
    check_size_and_rate,
    drop_path_rates,
    image_sides,
    init_linear,
    make_classifier,
)
from .fusing import Layer, fold_before, fold_neighbours, is_affine, is_layer, scale_and_shift
from .layers import DropPath, LayerNorm, Mlp, convolve, pad_to_multiple, round_up, zero_pad
from .swin import SwinConfig, SwinStage, WindowAttention, cut_patches, gather_cells

MakeMixer = Callable[[int, int], nn.Module]
"""From the numbers of a stage and of a block in it to the block's mixer."""


class MakeNorm(Protocol):
    """Builds a norm of the last axis, as `LayerNorm` does."""

    def __call__(self, channels: int, *, keep_float32: bool = False, eps: float = 1e-5) -> nn.Module:
        """A norm of so many channels; with `keep_float32` no linear layer follows it."""


# Pieces that frames share.


class PatchEmbed(nn.Module):
    """Stem: one token per patch of an image, and a norm."""

    def __init__(self, in_chans: int, channels: int, patch_size: int, norm: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, channels, patch_size, patch_size)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ceil(H/patch), ceil(W/patch), C)."""
        size = self.proj.stride[0]
        patches = cut_patches(pad_to_multiple(x, size), size)
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))

    def fuse_(self) -> None:
        """Fold the norm into the convolution in front of it."""
        fold_neighbours(self, ("proj", "norm"))


class MapEmbed(PatchEmbed):
    """The same of a map (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/patch), ceil(W/patch), C')."""
        size = self.proj.stride[0]
        down, across = (round_up(side, size) - side for side in x.shape[1:3])
        return self.norm(convolve_patches(self.proj, zero_pad(x, 0, 0, 0, across, 0, down)))


def convolve_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel: (B, H, W, C) to (B, H/stride, W/stride, C'), all sides whole."""
    batch, height, width, channels = x.shape
    size = conv.stride[0]
    patches = x.reshape(batch, height // size, size, width // size, size, channels).transpose(2, 3).flatten(3)
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class Block(nn.Module):
    """Pre-norm block: a token mixer and an MLP, each on a residual branch.

    Args:
        channels: Channels of the tokens.
        mixer: What mixes them, called `attn`. Its attribute `reads` names the layers that read its input, where that
            is not `qkv` alone; `fuse` folds the norm in front into these.
        hidden: Hidden channels of the MLP.
        drop_path: Rate of stochastic depth.
        norm: Builds the norms.
    """

    def __init__(
        self, channels: int, mixer: nn.Module, hidden: int, drop_path: float, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.attn = mixer
        self.norm2 = norm(channels)
        self.mlp = Mlp(channels, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """(B, ..., C) to the same shape; `where` goes to the mixer."""
        x = x + self.drop_path(self.attn(self.norm1(x), *where))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fuse_(self) -> None:
        """Fold each norm into the layers that read it."""
        fold_norm(self, "norm1", [self.attn.get_submodule(name) for name in getattr(self.attn, "reads", ("qkv",))])
        fold_norm(self, "norm2", [self.mlp.fc1])


def fold_norm(parent: nn.Module, name: str, readers: Sequence[nn.Module]) -> None:
    """Fold a norm into all layers that read it, if that is possible; it becomes an identity."""
    norm = parent.get_submodule(name)
    if is_affine(norm) and all(is_layer(reader) for reader in readers):
        for reader in readers:
            fold_before(*scale_and_shift(norm), cast(Layer, reader))
        setattr(parent, name, nn.Identity().train(parent.training))


def resize_positions(
    table: Tensor, old: Sequence[int], new: Sequence[int], mode: str, class_token: bool = False
) -> Tensor:
    """Resize a position table to another grid; a class token's row in front stays as it is.

    Args:
        table: (1, rows * columns, C), or with a class token a row more.
        old: Its rows and columns.
        new: Those wanted.
        mode: Interpolation, as torch names it.
        class_token: Whether the first row is a class token's.

    Returns:
        (1, L, C) in the dtype of `table`.
    """
    if class_token:
        return torch.cat((table[:, :1], resize_positions(table[:, 1:], old, new, mode)), 1)
    image = table.unflatten(1, tuple(old)).permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
    image = F.interpolate(image, size=tuple(new), mode=mode, align_corners=False)
    return image.flatten(2).mT.to(table.dtype)


def same_grid(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two grids are equal for every size that a trace stands for."""
    return all(known(a == b) for a, b in zip(one, other, strict=True))


def square_grid(positions: int) -> tuple[int, int] | None:
    """Rows and columns of a square of so many positions."""
    side = math.isqrt(positions)
    return (side, side) if side**2 == positions else None


def attend(qkv: Tensor) -> Tensor:
    """Softmax attention of all tokens to all: (B, L, 3, heads, d) to (B, L, heads * d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _check_positive(**fields: float | Sequence[float]) -> None:
    numbers = [n for value in fields.values() for n in (value if isinstance(value, Sequence) else (value,))]
    if min(numbers) <= 0:
        raise ValueError(f"{', '.join(fields)} must be positive, got {', '.join(map(str, fields.values()))}")


def _check_stages(**fields: Sequence[float]) -> None:
    if len({len(value) for value in fields.values()}) > 1 or not all(fields.values()):
        raise ValueError(f"{', '.join(fields)} need one entry per stage, got {', '.join(map(str, fields.values()))}")


# DeiT.


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
        _check_positive(
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
        return resize_positions(self.pos_embed, grid, (rows, columns), "bicubic", self.config.class_token)

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
        state["pos_embed"] = resize_positions(table, old, new, "bicubic", token)
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


# PVT.


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
        _check_stages(**fields)
        _check_positive(**fields)
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
            table = resize_positions(table, grid, (rows, columns), "bilinear")
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
                state[name] = resize_positions(state[name], old, new, "bilinear")
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


# Swin.


class PatchMerging(nn.Module):
    """Halve the map and double its channels."""

    def __init__(self, channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm = norm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.reduction(self.norm(gather_cells(x)))

    def fuse_(self) -> None:
        """Fold the norm into the linear layer behind it."""
        fold_norm(self, "norm", [self.reduction])


class SwinHost(Backbone):
    """Swin's frame: a pyramid whose maps are halved by merging 2 x 2 patches.

    Args:
        config: The design.
        mixer: Builds the mixer of a block.
        norm: Builds a norm.
        **kwargs: `num_classes`, `in_chans`, `features_only` and `out_indices` of `Backbone`.
    """

    layout = "NHWC"
    no_decay = r"relative_position_bias_table$"
    stem_name = "patch_embed.proj"

    def __init__(self, config: SwinConfig, mixer: MakeMixer, norm: MakeNorm = LayerNorm, **kwargs: Any) -> None:
        stages = [Stage(f"layers.{i}", c, config.patch_size * 2**i) for i, c in enumerate(config.channels)]
        super().__init__(config, stages, **kwargs)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        embed_norm = norm(config.embed_dim, keep_float32=True)
        self.patch_embed = PatchEmbed(self.in_chans, config.embed_dim, config.patch_size, embed_norm)
        self.layers = nn.ModuleList()
        for i, channels in enumerate(config.channels[: self.built_stages]):
            hidden = int(channels * config.mlp_ratio)
            blocks = [Block(channels, mixer(i, j), hidden, rate, norm) for j, rate in enumerate(rates[i])]
            merging = PatchMerging(channels, norm) if i < self.built_stages - 1 else None
            self.layers.append(SwinStage(blocks, merging))
        if config.output_norms:
            self.add_output_norms()
        if not self.features_only:
            self.norm = norm(self.num_features, keep_float32=True)
            self.head = make_classifier(self.num_features, self.num_classes)
        init_host(self, self.no_decay)

    def stem(self, x: Tensor) -> Tensor:
        """Image to tokens; see `Backbone`."""
        return self.patch_embed(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; see `Backbone`."""
        return self.run_blocks(cast(SwinStage, self.layers[index]).blocks, x)

    def downsample(self, index: int, x: Tensor) -> Tensor:
        """Patch merging in front of stage `index`; see `Backbone`."""
        return cast(SwinStage, self.layers[index - 1]).downsample(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Final norm; see `Backbone`."""
        return self.norm(x)

    def fuse_final_norm_(self) -> None:
        """Fold the final norm into the classifier: the mean over positions commutes with it."""
        fold_norm(self, "norm", [self.get_classifier()])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One layer per block, numbered through all stages; patch merging goes with the last block before it."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        merging = [(rf"^layers\.{i}\.downsample", (i, depth - 1)) for i, depth in enumerate(self.config.depths)]
        return {"stem": r"^patch_embed", "blocks": [*merging, (r"^layers\.(\d+)\.blocks\.(\d+)", None)]}


class ShiftedWindowAttention(WindowAttention):
    """Swin's attention of one block, which knows whether its windows are shifted; see `WindowAttention`."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool) -> None:
        super().__init__(
            config.channels[stage], config.num_heads[stage], config.windows[stage], always_shift=config.output_norms
        )
        self.shifted = shifted

    def forward(self, x: Tensor, shifted: bool | None = None) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return super().forward(x, self.shifted if shifted is None else shifted)


# CSwin.


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
        _check_stages(depths=self.depths, num_heads=self.num_heads)
        _check_positive(
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


def init_host(model: nn.Module, tables: str = r"$^") -> None:
    """The published initialisation: linear layers and parameters of these names normal, convolutions as torch has."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_linear(module)
    for name, parameter in model.named_parameters():
        if re.search(tables, name):
            nn.init.normal_(parameter, std=0.02)
