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
        block: Places of a block that a tile meets at a time, likewise.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
        per_sm: Programs that a multiprocessor has at a time, of kernels that loop over images.
        stack: Tiles of a program, one below the other, of the forward kernel whose blocks hold all keys.
        more: Rows of a second block right below the first, of the same kernel: a reach of 10 is 8 and 2, not 16.
        registers: What a thread may have; 0 for as many as the compiler likes.
    """

    tile: Sides
    block: Sides
    warps: int
    stages: int
    per_sm: int = 4
    stack: int = 1
    more: int = 0
    registers: int = 0

    @property
    def keys(self) -> int:
        """Keys of all blocks of a step."""
        z, y, x = self.block
        return z * (y + self.more) * x


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
    # A sweep on an H100 found 32 keys of one warp 1.1 times as fast as 64 of four; for wider ones it has no registers.
    narrow = kind == "keys" and itemsize == 2 and d <= 32
    shapes = itertools.product(_boxes(32 if narrow else most), _boxes(most))
    # Of equals those with the longest rows, which lie together in memory.
    tile, block = min(shapes, key=lambda shape: (_cost(shape[0], shape[1], sizes, kernel, d), -shape[1][2]))
    warps, ahead = 1 if narrow else most // 16, kind in ("forward", "keys") and itemsize == 2
    return Tile(tile, block, warps, stages=2 if ahead else 1)


@lru_cache(maxsize=256)
def whole(kind: Kind, sizes: Sides, kernel: Sides, d: int, itemsize: int) -> Tile | None:
    """Tiles whose windows fit a block of keys, or one and a smaller below it; None if there are none.

    In the forward pass a warp has 16 queries: a stack of such tiles with a block of keys each, or a tile of 32, whose
    keys are fetched once for twice as many queries. A thread holds a quarter of the logits of a query, what is added to
    them, and its part of the keys: beyond 160 keys, or 5120 numbers of them, that is more than its registers. In the
    backward pass, where the gradient of the logits and its sum over images come to that, warps divide the keys.
    """
    forward = kind == "forward"
    found: dict[Tile, float] = {}
    for tile in _boxes(16) + _boxes(32):
        reach = (min(side + more - 1, size) for side, more, size in zip(tile, kernel, sizes, strict=True))
        for block, more in covers(*reach):
            chosen, queries = Tile(tile, block, warps=2, stages=3, more=more), math.prod(tile)
            if itemsize != 2 or chosen.keys > 160 or chosen.keys * power_of_two(d) > 5120:
                continue
            if forward and queries == 32:
                # Programs as registers allow: eight of them hide each other's loads, fewer have theirs ahead.
                per_sm = 4 if chosen.keys > 96 or d > 32 else 5 if chosen.keys > 64 else 8
                chosen = replace(chosen, stages=2 if per_sm == 8 else 3, per_sm=per_sm)
                found[chosen] = _waste(tile, sizes) * chosen.keys * (1 + KEY_COST * d / queries)
            elif forward and not more:
                # At 56 x 56, 7 x 7 and 32 channels a sweep on an H100 found two warps 1.4 times as fast as four. Three
                # stages, of which two are in memory at a time, have no room there.
                for stack in (2, 4):
                    stacked = replace(chosen, warps=stack, stages=2, per_sm=16 // stack, stack=stack)
                    waste = _waste((tile[0], tile[1] * stack, tile[2]), sizes)
                    found[stacked] = waste * chosen.keys * (1 + KEY_COST * d / queries)
            elif not forward and queries == 16 and not more:
                # Within 3 % of the best of that sweep at 7 x 7 and 32 channels, for maps of 56 x 56 to 14 x 14.
                chosen = replace(chosen, warps=4, per_sm=3 if chosen.keys > 64 else 4)
                found[chosen] = _waste(tile, sizes) * chosen.keys
    return min(found, key=lambda tile: (found[tile], max(tile.tile)), default=None)  # of equals the squarest


def covers(z: int, y: int, x: int) -> Iterator[tuple[Sides, int]]:
    """Blocks for a box of keys, sides powers of two, with the rows of a second below: one block, and two if smaller."""
    z, x = (1 << (n - 1).bit_length() for n in (z, x))
    high = 1 << (y - 1).bit_length()
    least = -(-16 // (z * x))  # rows that a matrix unit takes
    yield (z, max(high, least), x), 0
    low = high // 2
    more = max(1 << (y - low - 1).bit_length(), least)
    if least <= low < y and low + more < high:
        yield (z, low, x), more


@lru_cache(maxsize=256)
def shares(programs: int, images: int, places: int) -> int:
    """Shares of the images for so many tiles, where so many programs run at a time: few, and none waits for a last."""

    def time(count: int) -> int:
        return -(-programs * count // places) * (-(-images // count) + START_COST)

    return min(range(1, min(images, MAX_SHARES * max(1, places // programs)) + 1), key=time)


def _waste(tile: Sides, sizes: Sides) -> float:
    """Places of all tiles for each place of a group."""
    return math.prod(-(-size // side) * side / size for size, side in zip(sizes, tile, strict=True))


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
