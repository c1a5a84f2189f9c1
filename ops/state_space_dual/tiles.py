"""Launch parameters of the kernels of state space duality.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
None of them has been searched for yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

ROWS = 64
"""Tokens of a tile in half precision. In the causal form they see each other by a product of their own."""

WHOLE = 1024
"""Tokens of which one program still finds in the cache what it read in its first pass over them."""

SCANNED = 256
"""Numbers of a state that a program of `scan` carries from chunk to chunk."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Tokens that a program holds at a time.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
    """

    rows: int
    warps: int
    stages: int = 1


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def _side(P: int, N: int) -> int:
    return max(power_of_two(P), power_of_two(N))


# Four warps where they have the registers: from compute capability 9.0 on they take 64 rows of a product at once, and
# eight would share them.


def collect(itemsize: int) -> Tile:
    """Tile of the kernel that sums what tokens add to a state."""
    return Tile(ROWS, 4, 3) if itemsize == 2 else Tile(32, 4, 2)


@lru_cache
def outputs(P: int, N: int, itemsize: int, causal: bool) -> Tile:
    """Tile of the kernel that has tokens read states."""
    wide = _side(P, N) > 64
    if itemsize == 2:
        return Tile(ROWS, 8 if wide and causal else 4, 2)
    narrow = wide or (causal and _side(P, N) > 32)
    return Tile(16 if narrow else 32, 8 if narrow else 4)


@lru_cache
def gradients(P: int, N: int, itemsize: int, causal: bool) -> Tile:
    """Tile of the kernel that makes the gradients of a tile. Larger ones in float32 would not fit into registers."""
    if itemsize == 2:
        return Tile(32, 8) if _side(P, N) > 64 else Tile(ROWS, 4)
    return Tile(16, 8 if _side(P, N) > 32 else 4)


def chunk(tokens: int, pairs: int, rows: int, processors: int) -> int:
    """Length of the chunks that sequences are cut in, a multiple of the rows of a tile.

    Two programs for each multiprocessor keep the memory busy. If there are not so many pairs of a sequence and a head,
    sequences are cut for twice that number, into chunks that still take a program four tiles.
    """
    tiles = -(-tokens // rows)
    if pairs >= 2 * processors:
        return tiles * rows
    chunks = max(1, min(-(-4 * processors // pairs), tiles // 4))
    return -(-tiles // chunks) * rows


def whole(tokens: int, pairs: int, processors: int) -> bool:
    """Whether one program takes a whole sequence of a head, without an order: sums its state, and then reads it."""
    return pairs >= processors and tokens <= WHOLE


def stretch(rows: int) -> int:
    """Tokens for which a program loads the one state."""
    return 4 * rows
