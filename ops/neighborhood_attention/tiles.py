"""Launch parameters of the neighborhood attention kernels.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Kind = Literal["forward", "queries", "keys", "bias"]
Sides = tuple[int, int, int]

KEY_COST = 40 * 2**-5
"""Time to fetch a channel of a key and its value, in that of a query-key pair: an estimate, L2 against instructions."""
STEP_COST = 1280
"""Time of a step of the loop over blocks beyond that of its pairs and keys, in that of a pair: likewise."""
START_COST = 3
"""Time to start a program of a kernel that loops over images, in that of an image: likewise."""
MAX_SHARES = 8
"""Most shares of the images beyond those that fill the GPU: each writes a sum."""
FEWEST_IMAGES = 8
"""From how many images on the gradient of the bias is summed for each tile of queries: its sums take as much memory as
queries, keys and values of a few images."""
UNKNOWN = 2**20
"""Stands for the size of an axis that tracing leaves free."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        tile: Places of a tile along each axis, powers of two; queries, or keys in the kernel of their gradients.
        block: Places of a block that a tile meets at a time, likewise, of kernels that visit block after block.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
        per_sm: Programs that a multiprocessor has at a time, of kernels that loop over images.
        stack: Tiles of a program, one below the other, of the forward kernel whose blocks hold all keys.
        keys: Keys of the only block, of kernels whose blocks hold all keys: a power of two.
        more: Keys of a second block behind the first, of the forward kernel among them: 140 are 128 and 16, not 256.
        turns: Whether tiles of the last rows of the same kernel are half as high and twice as wide, if that is enough.
        registers: What a thread may have; 0 for as many as the compiler likes.
    """

    tile: Sides
    block: Sides
    warps: int
    stages: int
    per_sm: int = 4
    stack: int = 1
    keys: int = 0
    more: int = 0
    turns: bool = False
    registers: int = 0


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def places(d: int, itemsize: int) -> int:
    """Places of a tile and of a block, fewer where three-fold products of float32 take room."""
    return 64 if itemsize == 2 or d <= 32 else 32 if d <= 64 else 16


@lru_cache(maxsize=256)
def tiled(kind: Kind, sizes: Sides, kernel: Sides, d: int, itemsize: int) -> Tile:
    """Tile and block for groups of so many places along each axis and windows of so many.

    Of all shapes with one number of queries and one of keys these are the ones that cost least by the estimate above:
    what counts is how many pairs are visited that nobody sees.
    """
    most = places(d, itemsize)
    # Sweeps on an H100 found 32 keys of one warp 1.1 times as fast as 64 of four, and 32 queries at a time 1.05 times
    # as fast as 64, with registers for twelve programs; for wider keys or queries there are none.
    narrow = kind == "keys" and itemsize == 2 and d <= 32
    most = 32 if narrow else most
    shapes = itertools.product(_boxes(most), _boxes(most))
    # Of equals those with the longest rows, which lie together in memory.
    tile, block = min(shapes, key=lambda shape: (_cost(shape[0], shape[1], sizes, kernel, d), -shape[1][2]))
    warps, ahead = 1 if narrow else most // 16, kind in ("forward", "keys") and itemsize == 2
    return Tile(tile, block, warps, stages=2 if ahead else 1, registers=168 if narrow else 0)


@lru_cache(maxsize=256)
def whole(kind: Kind, sizes: Sides, kernel: Sides, d: int, itemsize: int) -> Tile | None:
    """Tiles whose windows fit a block of keys, or one and a smaller behind it; None if there are none.

    In the forward pass a warp has 16 queries: a stack of such tiles with a block of keys each, or a tile of 32, whose
    keys are fetched once for twice as many queries. A thread holds a quarter of the logits of a query, what is added to
    them, and its part of the keys: beyond 160 keys, or 5120 numbers of them, that is more than its registers. In the
    backward pass, where the gradient of the logits and its sum over images come to that, warps divide the keys.
    """
    forward = kind == "forward"
    found: dict[Tile, float] = {}
    for tile in _boxes(16) + _boxes(32):
        for keys, more in covers(reach(tile, sizes, kernel)):
            chosen, queries, columns = Tile(tile, (1, 1, 1), 2, 3, keys=keys, more=more), math.prod(tile), keys + more
            if itemsize != 2 or columns > 160 or columns * power_of_two(d) > 5120:
                continue
            if forward and queries == 32:
                # Programs as registers allow: eight of them hide each other's loads, fewer have theirs ahead.
                per_sm = 4 if columns > 96 or d > 32 else 5 if columns > 64 else 8
                turns = turnable(tile, sizes, kernel, columns)
                chosen = replace(chosen, stages=2 if per_sm == 8 else 3, per_sm=per_sm, turns=turns)
                found[chosen] = _waste(tile, sizes, turns) * columns * (1 + KEY_COST * d / queries)
            elif forward and not more:
                # At 56 x 56, 7 x 7 and 32 channels a sweep on an H100 found two warps 1.4 times as fast as four. Three
                # stages, of which two are in memory at a time, have no room there.
                for stack in (2, 4):
                    stacked = replace(chosen, warps=stack, stages=2, per_sm=16 // stack, stack=stack)
                    waste = _waste((tile[0], tile[1] * stack, tile[2]), sizes)
                    found[stacked] = waste * columns * (1 + KEY_COST * d / queries)
            elif not forward and queries == 16 and not more:
                # Within 3 % of the best of that sweep at 7 x 7 and 32 channels, for maps of 56 x 56 to 14 x 14.
                chosen = replace(chosen, warps=4, per_sm=3 if columns > 64 else 4)
                found[chosen] = _waste(tile, sizes) * columns
    return min(found, key=lambda tile: (found[tile], max(tile.tile)), default=None)  # of equals the squarest


def reach(tile: Sides, sizes: Sides, kernel: Sides) -> int:
    """Most keys that a tile sees."""
    return math.prod(min(side + more - 1, size) for side, more, size in zip(tile, kernel, sizes, strict=True))


def covers(keys: int) -> Iterator[tuple[int, int]]:
    """Blocks for so many keys, powers of two that a matrix unit takes: one, and two if together they are smaller."""
    one = power_of_two(keys)
    yield one, 0
    low = one // 2
    more = power_of_two(max(1, keys - low))
    if low >= 16 and low + more < one:
        yield low, more


def turnable(tile: Sides, sizes: Sides, kernel: Sides, columns: int) -> bool:
    """Whether the last rows of a group fit tiles half as high, whose keys fit as many columns if twice as wide."""
    z, y, x = tile
    return 0 < sizes[1] % y <= y // 2 and reach((z, y // 2, 2 * x), sizes, kernel) <= columns


@lru_cache(maxsize=256)
def shares(programs: int, images: int, places: int) -> int:
    """Shares of the images for so many tiles, where so many programs run at a time: few, and none waits for a last."""

    def time(count: int) -> int:
        return -(-programs * count // places) * (-(-images // count) + START_COST)

    return min(range(1, min(images, MAX_SHARES * max(1, places // programs)) + 1), key=time)


def _waste(tile: Sides, sizes: Sides, turns: bool = False) -> float:
    """Places of all tiles for each place of a group."""
    planes, rows, columns = (-(-size // side) for size, side in zip(sizes, tile, strict=True))
    plane = (rows - 1) * columns + -(-sizes[2] // (2 * tile[2])) if turns else rows * columns
    return planes * plane * math.prod(tile) / math.prod(sizes)


def _boxes(volume: int) -> list[Sides]:
    """All boxes of a volume whose sides are powers of two."""
    sides = [1 << i for i in range(volume.bit_length())]
    return [(z, y, volume // (z * y)) for z in sides for y in sides if volume % (z * y) == 0]


def _cost(tile: Sides, block: Sides, sizes: Sides, kernel: Sides, d: int) -> float:
    """Estimated time for each place of a group, in visits of a pair."""
    tiles = math.prod(-(-size // side) for size, side in zip(sizes, tile, strict=True)) / math.prod(sizes)
    blocks = math.prod(
        -(-min(side + reach - 1, size) // step)
        for side, step, reach, size in zip(tile, block, kernel, sizes, strict=True)
    )
    return tiles * blocks * (math.prod(block) * (math.prod(tile) + KEY_COST * d) + STEP_COST)
