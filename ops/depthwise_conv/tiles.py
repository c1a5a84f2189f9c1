"""Launch parameters of the depthwise convolution kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

LINE = 128
"""Bytes of neighbouring channels that are worth reading together."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Rows of a tile of pixels, a power of two of at most 16, so that offsets in it keep within 32 bits; of a
            strip, as kernels for 3 x 3 filters take them, the most that it may have.
        columns: Columns of a tile of pixels, a power of two; for strips at least 2.
        channels: Channels of a tile, a power of two.
        warps: Warps of a program.
        per_sm: Programs for each multiprocessor, of the kernels that loop over tiles or strips.
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


def strip(channels: int, itemsize: int, rows: int, per_sm: int = 0) -> Tile:
    """Two warps to a strip, and 8 numbers of its row to a thread: four channels of two pixels."""
    width = block(channels, itemsize)
    return Tile(rows, 512 // width, width, warps=2, per_sm=per_sm)


@lru_cache
def forward_three(channels: int, itemsize: int) -> Tile:
    """Strips of the kernel that convolves with 3 x 3 filters: short, so that there are enough of them."""
    return strip(channels, itemsize, rows=8)


@lru_cache
def forward(channels: int, itemsize: int) -> Tile:
    """Tile of the kernel that convolves with larger filters."""
    return Tile(4, 8, block(channels, itemsize), warps=2)


@lru_cache
def backward(channels: int, itemsize: int) -> Tile:
    """Strips of the kernel of both gradients: as many programs as registers of an H100 leave room for."""
    return strip(channels, itemsize, rows=16, per_sm=6 if itemsize == 2 else 4)


@lru_cache
def weight_gradient(channels: int, itemsize: int) -> Tile:
    """Tile of the kernel that sums for three taps: 8 numbers a thread."""
    width = block(channels, itemsize)
    return Tile(*pixels(1024 // width), width, warps=4, per_sm=4)
