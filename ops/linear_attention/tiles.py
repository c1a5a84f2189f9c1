"""Launch parameters of the kernels of linear attention.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
None of them has been searched for yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

STRETCH = 512
"""Tokens for which a program loads the sums of a head, where others have made them."""


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


def _side(d: int, e: int) -> int:
    return max(power_of_two(d), power_of_two(e))


# Rows are few where a kernel holds much for each of them, so that nothing of it goes to memory: that a compiler says.


@lru_cache
def collect(d: int, e: int, itemsize: int) -> Tile:
    """Tile of the kernel that sums what tokens add to the state of a head."""
    return Tile(64 if itemsize == 2 else 32, 4, 3)


@lru_cache
def outputs(d: int, e: int, itemsize: int, local: bool) -> Tile:
    """Tile of the kernel that has tokens read it; a whole head is summed in the same tiles."""
    if itemsize == 2:
        return Tile(32 if local else 64, 4, 3)
    return Tile(16 if local and _side(d, e) > 32 else 32, 4, 2)


@lru_cache
def query_gradients(d: int, e: int, itemsize: int, mean: bool) -> Tile:
    """Tile of the kernel that makes gradients of queries, by the subtraction of means or another rule."""
    if itemsize == 2:
        return Tile(64 if mean else 32, 4, 2)
    return Tile(32 if _side(d, e) <= 32 else 16, 4, 2)


@lru_cache
def key_gradients(d: int, e: int, itemsize: int, flow: bool, local: bool) -> Tile:
    """Tile of the kernel that makes gradients of keys and values; those of local kernels are nine sums of its size."""
    wide = _side(d, e) > 32
    if local:
        return Tile(16, 8 if wide else 4, 2)
    if itemsize == 2:
        return Tile(32 if flow and wide else 64, 4, 2)
    return Tile(16 if wide else 32, 4, 2)


def chunk(tokens: int, pairs: int, rows: int, processors: int) -> int:
    """Length of the chunks that tokens are cut in, a multiple of the rows of a tile.

    Two programs for each multiprocessor keep the memory busy. If there are not so many pairs of an image and a head,
    their tokens are cut for twice that number, into chunks that still take a program four tiles.
    """
    tiles = -(-tokens // rows)
    if pairs >= 2 * processors:
        return tiles * rows
    chunks = max(1, min(-(-4 * processors // pairs), tiles // 4))
    return -(-tiles // chunks) * rows
