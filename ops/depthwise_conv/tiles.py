"""Launch parameters of the depthwise convolution kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

LINE = 128
"""Bytes of neighbouring channels that are worth reading together."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Rows of a tile of pixels, a power of two of at most 16, so that offsets in it keep within 32 bits.
        columns: Columns of a tile of pixels, a power of two.
        channels: Channels of a tile, a power of two.
        warps: Warps of a program.
        per_sm: Programs for each multiprocessor, of the kernels that loop over tiles.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    per_sm: int = 0


def block(channels: int, itemsize: int) -> int:
    """Channels of a tile: a line of memory, or half of it where fewer channels beyond the last one are computed."""
    line = LINE // itemsize
    return min((line, line // 2, 16), key=lambda size: -(-channels // size) * size)


def pixels(count: int) -> tuple[int, int]:
    """Rows and columns of a tile of `count` pixels, a power of two: a square, or twice as wide as high."""
    rows = 1 << (count.bit_length() - 1) // 2
    return rows, count // rows


@lru_cache
def forward(channels: int, itemsize: int) -> Tile:
    """Tile of the kernel that convolves: at most 4 % behind the fastest of a sweep on an H100, DaViT-T at batch 128."""
    return Tile(4, 8, block(channels, itemsize), warps=2)


@lru_cache
def backward(channels: int, itemsize: int) -> Tile:
    """Tile of the kernel of both gradients, the fastest of that sweep at stages 1 and 2: 4 numbers a thread."""
    del itemsize  # the same for both
    return Tile(2, 4, min(64, max(16, 1 << (channels - 1).bit_length())), warps=4, per_sm=4)


@lru_cache
def weight_gradient(channels: int, itemsize: int) -> Tile:
    """Tile of the kernel that sums for three taps: 8 numbers a thread."""
    width = block(channels, itemsize)
    return Tile(*pixels(1024 // width), width, warps=4, per_sm=4)
