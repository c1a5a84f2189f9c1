"""Launch parameters of the kernels of gated linear attention.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
They are chosen by what a compiler says of instructions and registers; none of them has been searched for yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

SCANNED = 256
"""Numbers of a state that a program of `scan` carries from chunk to chunk."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Tokens that a program holds at a time, a power of two from 16 on.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
        registers: What a thread may have; 0 for as many as the compiler likes.
    """

    rows: int
    warps: int
    stages: int = 1
    registers: int = 0


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def _size(dk: int, dv: int) -> int:
    """Numbers of a state."""
    return power_of_two(dk) * power_of_two(dv)


# A warp takes 16 rows of a product at a time: more warps than rows / 16 would share them, and do more by themselves.
# Whether that pays is a matter of registers.


@lru_cache
def outputs(dk: int, dv: int, half: bool) -> Tile:
    """Tile of the kernel that walks with a state and makes the output.

    Registers are bounded so that a multiprocessor takes six programs of two warps, or four of four, as their walks are
    chains of waits. What does not fit are masks and the steps by halves, which few inputs take.
    """
    size = _size(dk, dv)
    if half:
        return Tile(32, 2, 2, 168) if size <= 2048 else Tile(32, 4, 2, 128) if size <= 4096 else Tile(32, 8, 2)
    return Tile(16, 2 if size <= 2048 else 8)


@lru_cache
def gradients(dk: int, dv: int, half: bool) -> Tile:
    """Tile of the kernel that makes the gradients of a tile. Longer ones would not fit into registers."""
    size = _size(dk, dv)
    if half:
        small = Tile(16, 1 if size <= 512 else 2, 1, 168)
        return small if size <= 2048 else Tile(16, 4, 1, 128) if size <= 4096 else Tile(16, 8)
    return Tile(16, 4 if size <= 2048 else 8)


@lru_cache
def states(dk: int, dv: int, half: bool, rows: int) -> Tile:
    """Tile of the kernel that walks through tiles of so many rows with a state.

    Four warps would get Hopper's wide products for 64 channels of keys, which reach beyond short tiles in float32. With
    80 registers instead of 96, twelve programs fit on a multiprocessor instead of ten.
    """
    size = _size(dk, dv)
    bounded = half and rows == 16 and 512 < size <= 2048
    return Tile(rows, 2 if size <= 4096 else 4, 3 if half else 2, 80 if bounded else 0)


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
