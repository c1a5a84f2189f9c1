"""Launch parameters of the window attention kernels.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
"""

from __future__ import annotations

from dataclasses import dataclass

WHOLE_LIMIT = 64
"""Largest window, in positions, whose logits one tile holds."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        queries: Queries of a tile.
        keys: Keys of a tile.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
        per_sm: Programs for each multiprocessor, of kernels that loop over windows.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    per_sm: int


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def is_whole(n: int, d: int, itemsize: int) -> bool:
    """Whether one tile holds all logits of a window of n positions, beside its vectors of d channels."""
    return n <= WHOLE_LIMIT and (itemsize == 2 or d <= 32)


def whole(n: int, d: int, itemsize: int, backward: bool) -> Tile:
    """Tile of the kernels that hold a window of n positions at once.

    For vectors of a window within 4 KiB these are the fastest of a sweep on an H100, by median time, at the shapes of
    the first three stages of Swin-T (N = 49, d = 32, bfloat16, batch 128). Larger ones have room for fewer stages.
    """
    side = power_of_two(n)
    warps = max(1, side // 16)
    vectors = side * power_of_two(d) * itemsize
    if backward:
        small = vectors <= 4096
        return Tile(side, side, warps, stages=2 if small else 1, per_sm=6 if small else 2)
    if vectors <= 4096:
        return Tile(side, side, warps, stages=3, per_sm=8)
    return Tile(side, side, warps, stages=2 if vectors <= 8192 else 1, per_sm=4)


def tiled(d: int, itemsize: int) -> Tile:
    """Tile of the kernels that walk over a window, smaller where three-fold products of float32 take room."""
    side = 64 if itemsize == 2 or d <= 32 else 32 if d <= 64 else 16
    return Tile(side, side, warps=4, stages=1, per_sm=4)
