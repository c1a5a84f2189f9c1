"""Launch parameters of the kernels of gated linear attention.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
None of them has been searched for yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

ROWS = 32
"""Tokens of a tile, a power of two. They see each other by products; a tile reads and leaves a state each way."""

SCANNED = 256
"""Numbers of a state that a program of `scan` carries from chunk to chunk."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Tokens that a program holds at a time; one number for all kernels of a pass.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
    """

    rows: int
    warps: int
    stages: int = 1


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache
def rows(dk: int, dv: int, half: bool) -> int:
    """Tokens of a tile. Larger ones in float32 would not fit into registers."""
    return ROWS if half or max(dk, dv) <= 64 else 16


@lru_cache
def states(dk: int, dv: int, half: bool) -> Tile:
    """Tile of the kernel that walks through tokens with a state."""
    wide = power_of_two(dk) * power_of_two(dv) > 4096
    return Tile(rows(dk, dv, half), 8 if wide else 4, 3 if half else 2)


@lru_cache
def outputs(dk: int, dv: int, half: bool) -> Tile:
    """Tile of the kernel that has tokens read states and each other."""
    return Tile(rows(dk, dv, half), 4)


@lru_cache
def gradients(dk: int, dv: int, half: bool) -> Tile:
    """Tile of the kernel that makes the gradients of a tile."""
    return Tile(rows(dk, dv, half), 4 if half and max(dk, dv) <= 64 else 8)


def chunk(tokens: int, walks: int, rows: int, processors: int) -> int:
    """Length of the chunks that sequences are cut in, a multiple of the rows of a tile.

    A program walks through a chunk with a state, tile by tile. Two walks for each multiprocessor hide that they wait;
    if there are not so many of a sequence, head and direction, sequences are cut for twice that number, into chunks
    that still take four tiles.
    """
    tiles = -(-tokens // rows)
    if walks >= 2 * processors:
        return tiles * rows
    chunks = max(1, min(-(-4 * processors // walks), tiles // 4))
    return -(-tiles // chunks) * rows
