"""Launch parameters of the routing attention kernels, and which of them a call gets.

All of them stay below 99 KiB of shared memory, the least that GPUs of compute capability 8.0 to 12.0 give a program.
"""

from __future__ import annotations

from dataclasses import dataclass

from vizoo.ops.tracing import known

SMALL_REGION = 64
"""Positions of regions that kernels are compiled for; larger ones, which differ with each image, are arguments."""

DENSE_REGIONS = 64
"""Regions of a map whose routes are the bits of one number."""

DENSE_NUMBERS = {2: 2**13, 4: 2**11}
"""Of the keys of a head of an image, which one program holds at once, by bytes of a number. Three-fold products of
float32 take room."""


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        queries: Queries of a tile.
        keys: Keys of a tile.
        warps: Warps of a program.
        stages: Loop iterations whose loads are in flight at once.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def side(d: int, itemsize: int) -> int:
    """Longest side of a tile of the kernels that walk over routes: three-fold products of float32 take room."""
    return 64 if itemsize == 2 or d <= 32 else 32 if d <= 64 else 16


def in_one_step(keys: int, d: int, itemsize: int) -> bool:
    """Whether one tile takes all keys of a query; then backward needs no output."""
    return known(keys <= side(d, itemsize))


def routed(queries: int | None, keys: int | None, d: int, itemsize: int, backward: bool) -> Tile:
    """Tile of the kernels that walk over routes, for the output and for the gradient of queries.

    Args:
        queries: Positions of a region, None if it is large.
        keys: Keys of a query, None if there are many.
        d: Channels of a head.
        itemsize: Bytes of a number.
        backward: Whether it is for the gradient. There, one tile must take all keys if they are given.
    """
    del backward  # both alike so far: nothing has been measured
    longest = side(d, itemsize)
    rows = longest if queries is None else min(longest, power_of_two(queries))
    cols = longest if keys is None else min(longest, power_of_two(keys))
    # With 64 rows a model with pooled keys once read where it may not, which nobody could repeat; with 32 it was run.
    rows = min(rows, 32) if cols == 16 else rows
    once = keys is not None and keys <= cols
    return Tile(rows, cols, _warps(rows, d, itemsize), stages=1 if once or d > 64 else 2)


def _warps(rows: int, d: int, itemsize: int) -> int:
    """Of halves one for each 16 rows; more where vectors or three-fold products would not fit into its registers."""
    return max(1, rows * itemsize // 32, min(4, power_of_two(d) * itemsize**2 // 256))


def routed_keys(keys: int | None, d: int, itemsize: int) -> Tile:
    """Tile of the kernel for the gradients of the keys of a region, of which there are so many; None for large ones.

    Regions differ in how many queries look at them: where they are small, long tiles would often be half empty.
    """
    longest = side(d, itemsize)
    cols = longest if keys is None else min(longest, power_of_two(keys))
    rows = longest if cols == longest else min(longest, 32)
    return Tile(rows, cols, max(2, _warps(cols, d, itemsize)), stages=1)


def is_dense(regions: int, region: int, keys: int, k: int, d: int, itemsize: int) -> bool:
    """Whether a small map is better held at once than walked over by its routes.

    Looking at all keys must be no more work than at the routed ones for queries padded to what a matrix unit takes.

    Args:
        regions: Regions of a map.
        region: Queries of a region.
        keys: Keys of a region.
        k: Routes of a region.
        d: Channels of a head.
        itemsize: Bytes of a number.
    """
    if not (known(regions <= DENSE_REGIONS) and known(region <= SMALL_REGION) and known(keys <= SMALL_REGION)):
        return False
    fits = power_of_two(int(regions * keys)) * power_of_two(d) <= DENSE_NUMBERS[itemsize]
    return fits and int(regions * region) <= max(16, int(region)) * k


def dense(keys: int, d: int, backward: bool) -> Tile:
    """Tile of the kernels that hold all keys of a small map, of d channels, at once, in registers."""
    cols = power_of_two(keys)
    many = cols * power_of_two(d) > 4096
    return Tile(32, cols, warps=8 if backward and many else 4, stages=1 if backward else 2)
