"""Launch parameters of the channel attention kernels.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

PARTS = 16
"""Chunks that the kernel which adds them up holds at a time."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Positions that a program holds at a time.
        channels: Length of a vector in the tile, a power of two.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
    """

    rows: int
    channels: int
    warps: int
    stages: int = 1


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache
def products(d: int, itemsize: int) -> Tile:
    """Tile of the kernel that sums over positions."""
    block = power_of_two(d)
    return Tile(64 if itemsize == 2 else 32, block, warps=2 if block <= 32 else 4, stages=3)


@lru_cache
def positions(d: int, itemsize: int) -> Tile:
    """Tile of the kernels that take each position by itself."""
    block = power_of_two(d)
    return Tile((256 if block <= 32 else 128) // itemsize, block, warps=4)


def chunk(positions: int, pairs: int, rows: int, processors: int) -> int:
    """Length of the chunks that the positions of an image are summed in, a multiple of the rows of a tile.

    Two programs for each multiprocessor keep the memory busy. If there are not so many pairs of an image and a group,
    images are cut for twice that number, into chunks that still take a program four tiles.
    """
    tiles = -(-positions // rows)
    if pairs >= 2 * processors:
        return tiles * rows
    chunks = max(1, min(-(-4 * processors // pairs), tiles // 4))
    return -(-tiles // chunks) * rows
