"""Launch parameters of the layer normalisation kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

FORWARD_NUMBERS = 2048
BACKWARD_NUMBERS = 1024


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Rows that a program holds at a time.
        channels: Length of a row in the tile, a power of two.
        warps: Warps of a program.
        per_sm: Programs for each multiprocessor, of the kernel that loops over rows.
    """

    rows: int
    channels: int
    warps: int
    per_sm: int = 0


@lru_cache
def forward(channels: int) -> Tile:
    """Tile of the forward kernel: 16 numbers a thread, so that enough bytes are under way."""
    block = max(16, 1 << (channels - 1).bit_length())
    rows = max(1, FORWARD_NUMBERS // block)
    return Tile(rows, block, warps=max(4, rows * block // 512))


@lru_cache
def backward(channels: int) -> Tile:
    """Tile of the backward kernel: half that size, for it holds two inputs and two sums."""
    block = max(16, 1 << (channels - 1).bit_length())
    rows = max(1, BACKWARD_NUMBERS // block)
    return Tile(rows, block, warps=max(4, rows * block // 512), per_sm=4)
