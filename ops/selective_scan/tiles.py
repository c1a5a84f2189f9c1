"""Launch parameters of the selective scan's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vizoo.ops.tracing import known

TOKENS = 16
"""Tokens of a tile, all of which a thread holds; also those between states kept for the backward pass."""
LONGEST = 256
"""Tokens of a row at most; at least half as many."""


class Tile(NamedTuple):
    """How a kernel is launched.

    Attributes:
        channels: Channels of a tile, a power of two; those of one program.
        warps: Warps of a program.
        unroll: States whose instructions are mixed, so that one computes while another waits. Backward it divides their
            number; else it is a power of two, 1 for one state or at least 4: those that a thread has at a time.
        registers: Of a thread at most; 0 for as many as the compiler likes.
    """

    channels: int
    warps: int
    unroll: int = 1
    registers: int = 0


def in_rows(states: int, tokens_together: bool, length: int) -> bool:
    """Whether tiles of the forward pass lie over threads as rows of tokens do in memory."""
    return states == 1 and tokens_together and known(length > 3 * LONGEST // 8)


def row(length: int) -> int:
    """Tokens of a row: half of the most for a sequence that has no more."""
    return LONGEST if known(length > LONGEST // 2) else LONGEST // 2


@lru_cache
def rows(each: int, row: int) -> Tile:
    """Tile of the kernel that scans rows, 8 numbers a thread; `each` is the number of channels of a group."""
    channels = min(1024 // row, 1 << (each - 1).bit_length())
    return Tile(channels, warps=max(1, channels * row // 256))


@lru_cache
def forward(states: int) -> Tile:
    """Tile of the kernel that scans: a channel a lane.

    Told how many registers there are, compilers read maps before they need them. A sweep on an H100 found bounds from
    200 to 255 and none within 3 % for long sequences, and 255 a tenth faster than 200 for 197 tokens.
    """
    if states == 1:
        return Tile(32, warps=1)
    return Tile(32, warps=1, unroll=min(16, max(4, 1 << (states - 1).bit_length())), registers=255)


@lru_cache
def ends(states: int) -> Tile:
    """Tile of the kernel that finds what splits add, which works as `forward` does."""
    return forward(states)


@lru_cache
def backward(states: int) -> Tile:
    """Tile of the kernel of the gradients. Few channels a tile are many parts of the gradients of B and C."""
    return Tile(32, warps=1, unroll=_divisor(states, 2))


def _divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def splits(tile: Tile, programs: int, tiles: int, multiprocessors: int) -> int:
    """In how many parts a sequence is cut for several programs: in none while there is a warp for each scheduler.

    What has been cut is read twice; parts shorter than 8 tiles are not worth it.
    """
    warps = programs * tile.warps
    if warps >= 4 * multiprocessors:
        return 1
    return max(1, min(8 * multiprocessors // warps, tiles // 8))
