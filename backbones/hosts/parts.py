"""What the frames have in common: embeddings of patches, blocks, position tables, initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.ops.tracing import known

from ..base import (
    init_linear,
)
from ..fusing import Layer, fold_before, fold_neighbours, is_affine, is_layer, scale_and_shift
from ..layers import DropPath, Mlp, pad_to_multiple, round_up, zero_pad
from ..swin import cut_patches

MakeMixer = Callable[[int, int], nn.Module]
"""From the numbers of a stage and of a block in it to the block's mixer."""


class MakeNorm(Protocol):
    """Builds a norm of the last axis, as `LayerNorm` does."""

    def __call__(self, channels: int, *, keep_float32: bool = False, eps: float = 1e-5) -> nn.Module:
        """A norm of so many channels; with `keep_float32` no linear layer follows it."""


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


def check_positive(**fields: float | Sequence[float]) -> None:
    """Refuse numbers, or sequences of them, that are not all positive; a ValueError names the fields."""
    numbers = [n for value in fields.values() for n in (value if isinstance(value, Sequence) else (value,))]
    if min(numbers) <= 0:
        raise ValueError(f"{', '.join(fields)} must be positive, got {', '.join(map(str, fields.values()))}")


def check_stages(**fields: Sequence[float]) -> None:
    """Refuse sequences of different lengths, or empty ones; a ValueError names the fields."""
    if len({len(value) for value in fields.values()}) > 1 or not all(fields.values()):
        raise ValueError(f"{', '.join(fields)} need one entry per stage, got {', '.join(map(str, fields.values()))}")


def init_host(model: nn.Module, tables: str = r"$^") -> None:
    """The published initialisation: linear layers and parameters of these names normal, convolutions as torch has."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_linear(module)
    for name, parameter in model.named_parameters():
        if re.search(tables, name):
            nn.init.normal_(parameter, std=0.02)
